"""Tiny models, batches written as strings, and a decoder written out in dense matrices to compare with."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.mlp import Mlp
from vlm.models.language import build_language
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel

VOCABULARY = 40


def build_model(
    kind: str = "llama",
    *,
    layers: int = 4,
    kv_heads: int = 2,
    shuffle: int = 1,
    image: int = 48,
    blocks: int = 1,
    class_token: bool = False,
) -> Any:
    """A model of width 32 with 4 query heads, in eval mode; its encoder has ``blocks`` blocks.

    Its weights are large enough that attention is far from even; double precision keeps tolerances tight.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "initializer_range": 0.25,
        "sliding_window": None,
    }
    vision = ConvVit(image, dim=16, depth=blocks, heads=2, class_token=class_token)
    language = build_language(options, VOCABULARY)
    model = VisionLanguageModel(vision, Mlp(vision.dim, 32, shuffle=shuffle), language).double().eval()
    if class_token:
        torch.nn.init.normal_(vision.model.cls_token)
    return model


def build_batch(*rows: str, side: str = "right", image: int = 48) -> Inputs:
    """One row per string: ``t`` is a random text token, ``#`` an image of noise. Rows are padded on ``side``."""
    g = torch.Generator().manual_seed(len("".join(rows)))
    longest = max(map(len, rows))
    tokens = torch.randint(0, VOCABULARY, (len(rows), longest), generator=g)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    owner = []
    for b, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        for t, mark in enumerate(row):
            valid[b, start + t] = True
            if mark == "#":
                tokens[b, start + t] = IMAGE_TOKEN
                owner.append(b)
    images = torch.randn(len(owner), 3, image, image, generator=g, dtype=torch.float64)
    return Inputs(tokens, valid, images, torch.tensor(owner, dtype=torch.long))


def take_row(inputs: Inputs, b: int) -> Inputs:
    """Row ``b`` as a batch of its own, without padding."""
    mine = inputs.owner == b
    tokens = inputs.tokens[b][inputs.valid[b]][None]
    return Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), inputs.images[mine], inputs.owner[mine] * 0)


def spliced_by_hand(model: Any, inputs: Inputs, b: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Embeddings [n, width] of row ``b``, which image each place shows (-1: text), the token (-1: image)."""
    row = take_row(inputs, b)
    pieces, image_of, token_of = [], [], []
    images = 0
    for token in row.tokens[0].tolist():
        if token == IMAGE_TOKEN:
            found = model.vision(row.images[images : images + 1])
            pieces.append(model.connector(found.tokens, found.grid)[0])
            image_of += [images] * len(pieces[-1])
            images += 1
        else:
            pieces.append(model.language.get_input_embeddings()(torch.tensor([token])))
            image_of.append(-1)
        token_of += [token] * len(pieces[-1])
    return torch.cat(pieces), torch.tensor(image_of), token_of


def decode_by_hand(
    model: Any,
    x: Tensor,
    position: Tensor | None = None,
    *,
    cut: Callable[[int, Tensor, Tensor], Tensor | None] = lambda layer, place, attention: None,
    edit: Callable[[int, Tensor, Tensor, Tensor], Tensor] = lambda layer, x, place, attention: attention,
    enter: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None] = lambda *state: None,
    reindex: bool = False,
) -> Tensor:
    """Logits [kept, vocab] of one sequence [n, width]: every layer written out with its attention matrix.

    ``cut(layer, place, attention of the layer before [heads, n, n])`` may give the rows that enter ``layer``;
    ``edit(layer, state that enters it, place, attention)`` gives the attention to use. ``place`` is each row's
    place in the whole sequence. ``enter(layer, state, place, attention of the layer before)`` may give other states,
    fewer, and the rows that they stand for. ``reindex`` counts positions anew after a cut.
    """
    decoder, place = model.decoder, torch.arange(len(x))
    position = place if position is None else position
    attention = torch.empty(0)
    for number, layer in enumerate(decoder.layers):
        kept = cut(number, place, attention)
        changed = (x[kept], kept) if kept is not None else enter(number, x, place, attention)
        if changed is not None:
            x, kept = changed
            position, place = position[kept], place[kept]
            position = torch.arange(len(x)) if reindex else position
        a, normed = layer.self_attn, layer.input_layernorm(x)[None]
        q, k, v = (f(normed).unflatten(2, (-1, a.head_dim)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *decoder.rotary_emb(x[None], position_ids=position[None]))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * a.head_dim**-0.5
        future = ~torch.ones(len(x), len(x), dtype=torch.bool).tril()
        attention = scores.masked_fill(future, -torch.inf).softmax(-1)[0]  # [heads, n, n]
        attention = edit(number, x, place, attention)
        x = x + a.o_proj((attention @ v[0]).transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.language.lm_head(decoder.norm(x))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def batch() -> Callable[..., Inputs]:
    return build_batch


@pytest.fixture(scope="session")
def alone() -> Callable[[Inputs, int], Inputs]:
    return take_row


@pytest.fixture(scope="session")
def spliced() -> Callable[..., tuple[Tensor, Tensor, list[int]]]:
    return spliced_by_hand


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., Tensor]:
    return decode_by_hand


def from_hash(seed: int, *shape: int) -> Tensor:
    """Numbers in [0, 1) made by an integer hash, so that they are the same everywhere."""
    h = (2654435761 * numpy.arange(numpy.prod(shape), dtype=numpy.uint64) + 1013904223 * seed) % 2**32
    for multiplier, shift in ((1, 16), (2246822519, 13), (3266489917, 16)):
        h = h * numpy.uint64(multiplier) % 2**32
        h ^= h >> numpy.uint64(shift)
    return torch.from_numpy((h / 2**32).astype(numpy.float32)).reshape(shape)


@pytest.fixture(scope="session")
def positive() -> Callable[..., Tensor]:
    """``positive(seed, *shape)``: numbers in [0, 1)."""
    return from_hash


@pytest.fixture(scope="session")
def signed() -> Callable[..., Tensor]:
    """``signed(seed, *shape)``: numbers in [-1, 1)."""
    return lambda seed, *shape: 2 * from_hash(seed, *shape) - 1


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What the authors' codes return on those inputs (CPU, single precision)."""
    path = Path(__file__).parents[1] / "golden" / "pruners.json"
    return json.loads(path.read_text(encoding="utf-8"))


class _Replayed:
    """A layer whose hooks run again when it is recomputed, as under the checkpoint of Transformers 5.17."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=False)  # type: ignore[misc]


@pytest.fixture(scope="session")
def checkpointing() -> Callable[[Any, str], None]:
    """``checkpointing(model, style)``: decoder layers are recomputed in the backward pass, by Transformers as it is
    (``"forward"``) or with their hooks (``"hooks too"``)."""

    def change(model: Any, style: str) -> None:
        if style == "forward":
            model.language.gradient_checkpointing_enable({"use_reentrant": False})
            return
        for layer in model.decoder.layers:
            layer.__class__ = type("Layer", (_Replayed, type(layer)), {})

    return change
