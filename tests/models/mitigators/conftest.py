"""A decoder written out in dense matrices that every mitigator inside it is compared with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def dense_decoder(
    model: Any,
    x: Tensor,
    *,
    scores: Callable[[int, int, Tensor], Tensor] = lambda layer, row, z: z,
    weights: Callable[[int, Tensor], Tensor] = lambda layer, attention: attention,
    heads: Callable[[int, Tensor], Tensor] = lambda layer, out: out,
    mlp: Callable[[int, Tensor], Tensor] = lambda layer, out: out,
    leave: Callable[[int, Tensor], None] = lambda layer, x: None,
) -> Tensor:
    """Logits [n, vocab] of one sequence [n, width].

    scores(layer, row, z [heads, row + 1]) before the softmax of each row; weights(layer, attention [heads, n, n]) after
    it; heads(layer, outputs [n, heads, dim]) before the output projection; mlp(layer, its output [n, width]);
    leave(layer, the state that leaves it) is only told.
    """
    decoder, n = model.decoder, len(x)
    for number, layer in enumerate(decoder.layers):
        a, normed = layer.self_attn, layer.input_layernorm(x)[None]
        q, k, v = (f(normed).unflatten(2, (-1, a.head_dim)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *decoder.rotary_emb(x[None], position_ids=torch.arange(n)[None]))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        z = (q @ k.transpose(2, 3) * a.head_dim**-0.5)[0]  # [heads, n, n]
        attention = torch.zeros_like(z)
        for row in range(n):
            attention[:, row, : row + 1] = scores(number, row, z[:, row, : row + 1]).softmax(-1)
        attention = weights(number, attention)
        x = x + a.o_proj(heads(number, (attention @ v[0]).transpose(0, 1)).flatten(1))
        x = x + mlp(number, layer.mlp(layer.post_attention_layernorm(x)))
        leave(number, x)
    return model.language.lm_head(decoder.norm(x))


@pytest.fixture(scope="session")
def dense() -> Callable[..., Tensor]:
    return dense_decoder
