"""Signals that only cache policies ask for. Each is read once, on the prompt."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.visibility import operands
from vlm.models.program.kv_budget import attention_density, query_similarity
from vlm.models.program.signals import Attention, Rows, Signal

CHUNK = 64  # rows whose attention is written out at a time


@dataclass(frozen=True)
class ReceivedSquares(Signal):
    """Sum over some rows of the square of what each key gets from them: [batch, heads, keys]. rows: as of
    :class:`~vlm.models.program.signals.Received`."""

    rows: Rows = "all"
    axis: ClassVar[int] = 2

    def read(self, seen: Attention) -> Tensor:
        return seen.received(seen.places(self.rows), reduce="sumsq")


@dataclass(frozen=True)
class QuerySimilarity(Signal):
    """How alike the last ``rows`` queries of the layer are, after the rotation, [batch]: see
    :func:`~vlm.models.program.kv_budget.query_similarity`."""

    rows: int = 32
    axis: ClassVar[int] = 0

    def read(self, seen: Attention) -> Tensor:
        place = seen.places(self.rows)  # [B,R]
        q = seen.q.gather(2, place.clamp_min(0)[:, None, :, None].expand(-1, seen.q.shape[1], -1, seen.q.shape[3]))
        return query_similarity(q, place >= 0)


@dataclass(frozen=True)
class Density(Signal):
    """Share of entries that the question's rows really look at, [batch]: see
    :func:`~vlm.models.program.kv_budget.attention_density`."""

    least: float = 0.01
    axis: ClassVar[int] = 0

    def read(self, seen: Attention) -> Tensor:
        dense = torch.zeros(len(seen.q), device=seen.q.device)
        total = torch.zeros_like(dense)
        for rows in seen.places("text").split(CHUNK, 1):
            attention, visible = rows_of(seen, rows)
            count = visible.sum((1, 2))
            dense = dense + attention_density(attention, visible, self.least) * count
            total = total + count
        return dense / total.clamp_min(1)


@dataclass(frozen=True)
class InputNorm(Signal):
    """L2 norm of what enters the layer's attention (after the layer's input norm): [batch, keys]."""

    of_state: ClassVar[bool] = True

    def read_state(self, hidden: Tensor, decoder: Any) -> Tensor:
        return decoder.layers[self.layer].input_layernorm(hidden).float().norm(dim=2)


def rows_of(
    seen: Attention, rows: Int[Tensor, "batch rows"]
) -> tuple[Float[Tensor, "batch heads rows keys"], Bool[Tensor, "batch rows keys"]]:
    """The attention of some rows of a prompt (-1: unused), written out, and which keys each of them sees."""
    x = operands("rows_of", seen.q, seen.k, None, seen.common)
    q = x.q.gather(2, rows.clamp_min(0)[:, None, :, None].expand(-1, x.q.shape[1], -1, x.q.shape[3]))
    visible = x.seen.pick(rows).mask().expand(len(rows), 1, -1, -1)  # [B,1,R,K]
    score = q.to(x.accumulator) @ x.per_head(x.k).to(x.accumulator).transpose(2, 3) * x.scale
    return score.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0), visible[:, 0]
