"""What a cache policy looks at, written out in dense matrices, and what it left."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlm.models.program.attach import attach


class Layer(NamedTuple):
    """One layer of one prompt. attention: [heads, n, n]; q [heads, n, d], k and v [kv_heads, n, d] after the rotation;
    normed: what enters the attention, [n, width]."""

    attention: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    normed: Tensor

    def paid(self, rows: Any, kv_heads: int = 2) -> Tensor:
        """Mean over the query heads of a key/value head of what each entry gets from some rows: [kv_heads, n]."""
        return self.attention[:, rows].sum(1).unflatten(0, (kv_heads, -1)).mean(1)


@pytest.fixture(scope="session")
def dense(spliced: Any, by_hand: Any) -> Callable[..., list[Layer]]:
    """``dense(model, inputs, b)``: every layer of row ``b``'s prompt."""

    def write_out(model: Any, inputs: Any, b: int = 0) -> list[Layer]:
        layers = []

        def look(number: int, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
            layer = model.decoder.layers[number]
            a, normed = layer.self_attn, layer.input_layernorm(x)
            projected = (f(normed)[None] for f in (a.q_proj, a.k_proj, a.v_proj))
            q, k, v = (states.unflatten(2, (-1, a.head_dim)).transpose(1, 2) for states in projected)
            q, k = apply_rotary_pos_emb(q, k, *model.decoder.rotary_emb(x[None], position_ids=place[None]))
            layers.append(Layer(attention, q[0], k[0], v[0], normed))
            return attention

        with torch.no_grad():
            x, _, _ = spliced(model, inputs, b)
            by_hand(model, x, edit=look)
        return layers

    return write_out


@pytest.fixture(scope="session")
def image_places(spliced: Any) -> Callable[..., Tensor]:
    """``image_places(model, inputs, b)``: which image each place of row ``b`` shows, -1 for text."""
    return lambda model, inputs, b=0: spliced(model, inputs, b)[1]


def positions_held(run: Any, layer: int, b: int, kv_heads: int = 2) -> list[list[int]]:
    layout = run.layouts[run.stage(layer)]
    if layer not in run.held:
        return [layout.position[b, layout.valid[b]].tolist()] * kv_heads
    held = run.held[layer]
    heads = zip(held.place[b], held.valid[b], strict=True)
    return [sorted(layout.position[b, place[valid]].tolist()) for place, valid in heads]


@pytest.fixture(scope="session")
def held() -> Callable[..., list[list[int]]]:
    """``held(run, layer, b)``: the positions that each head of a layer's cache holds of row ``b``."""
    return positions_held


@pytest.fixture(scope="session")
def kept() -> Callable[..., list[list[list[int]]]]:
    """``kept(model, inputs, method, b)``: the positions that each head of each layer keeps of row ``b``'s prompt."""

    def run_prompt(model: Any, inputs: Any, method: Any, b: int = 0, kv_heads: int = 2) -> list[list[list[int]]]:
        with torch.no_grad(), attach(model, method.program(model.facts)):
            _, stream = model.prefill(inputs)
        return [positions_held(stream.run, n, b, kv_heads) for n in range(len(model.decoder.layers))]

    return run_prompt


def best_of(score: Any, candidates: Any, count: int) -> list[int]:
    return sorted(sorted(candidates, key=lambda t: (-float(score[t]), t))[:count])


@pytest.fixture(scope="session")
def best() -> Callable[..., list[int]]:
    """``best(score, candidates, count)``: the candidates of largest score, the earlier of a tie, in order."""
    return best_of


def smooth_by_hand(score: Tensor, end: int, kernel: int, how: str = "mean") -> list[float]:
    out = []
    for t in range(end):
        near = score[max(t - kernel // 2, 0) : min(t + kernel // 2 + 1, end)].tolist()
        out.append(sum(near) / kernel if how == "mean" else max(near))
    return out


@pytest.fixture(scope="session")
def smooth() -> Callable[..., list[float]]:
    """``smooth(score, end, kernel, how)``: mean or maximum over neighbours of the first ``end`` entries."""
    return smooth_by_hand
