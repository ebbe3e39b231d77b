"""Neighborhood attention in plain PyTorch: the definition, with a dense mask, and the one that works in boxes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.neighborhood.tiles import tiles
from vlm.kernels.neighborhood.window import HIDDEN, Axis, entries, grid, lines
from vlm.kernels.visibility import Operands


@dataclass(frozen=True)
class Neighborhood:
    """What the operation adds to q, k and v: the grid and its windows, biases, and keys that every query sees."""

    axes: tuple[Axis, ...]
    bias: Float[Tensor, "heads offsets"] | None  # the axes of the table in one
    extra_k: Float[Tensor, "batch kv_heads extra dim"] | None
    extra_v: Float[Tensor, "batch kv_heads extra value_dim"] | None
    extra_bias: Float[Tensor, "heads tokens extra"] | None
    return_lse: bool


Result = tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads tokens"] | None]


def neighborhood_reference(x: Operands, n: Neighborhood) -> Result:
    """Any float type, any device, differentiable; tokens x tokens of memory."""
    along = [entries(axis, lines(axis), *_all_pairs(axis)) for axis in n.axes]
    entry = grid(along, [axis.offsets for axis in n.axes]).to(x.q.device)  # [N,N]
    scores = (x.q @ x.per_head(x.k).transpose(-1, -2)).to(x.accumulator) * x.scale  # [B,H,N,N]
    if n.bias is not None:
        scores = scores + n.bias.to(scores.dtype)[:, entry.clamp_min(0)]
    scores = scores.masked_fill(entry == HIDDEN, float("-inf"))
    values = x.per_head(_values(x))
    if n.extra_v is not None:
        scores = torch.cat([scores, _extra_scores(x, n)], -1)
        values = torch.cat([values, x.per_head(n.extra_v)], 2)
    out = scores.softmax(-1).to(values.dtype) @ values
    return out, scores.logsumexp(-1) if n.return_lse else None


def neighborhood_torch(x: Operands, n: Neighborhood) -> Result:
    """The same in boxes of queries: the best on a CPU, differentiable, tokens x (a few windows) of memory."""
    t = tiles(n.axes, x.q.device)
    columns = t.keys.shape[1]
    q, k, v = _take(x.q, t.queries), _take(x.per_head(x.k), t.keys), _take(x.per_head(_values(x)), t.keys)
    scores = (q @ k.transpose(-1, -2)).to(x.accumulator) * x.scale  # [B,H,T,R,C]
    scores = scores + _added(n.bias, t.entries, scores.dtype)
    if n.extra_v is not None:
        scores = torch.cat([scores, _take(_extra_scores(x, n), t.queries)], -1)  # [B,H,T,R,C+E]
    attention = scores.softmax(-1).to(v.dtype)
    out = (attention[..., :columns] @ v).flatten(2, 3)  # [B,H,TR,Dv]
    if n.extra_v is not None:
        out = out + attention[..., columns:].flatten(2, 3) @ x.per_head(n.extra_v)
    lse = scores.logsumexp(-1).flatten(2).index_select(2, t.position) if n.return_lse else None
    return out.index_select(2, t.position), lse


def _all_pairs(axis: Axis) -> tuple[Tensor, Tensor]:
    coordinate = torch.arange(axis.length)
    return coordinate[:, None], coordinate[None, :]


def _values(x: Operands) -> Tensor:
    assert x.v is not None
    return x.v


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """[B,H,N,D] and [T,R] -> [B,H,T,R,D]."""
    return x.index_select(2, tokens.flatten()).unflatten(2, tokens.shape)


def _added(bias: Tensor | None, entry: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: the bias, and -inf where a key is hidden; [H,T,R,C], or [T,R,C] without a bias."""
    if bias is None:
        return torch.zeros(entry.shape, dtype=dtype, device=entry.device).masked_fill(entry == HIDDEN, float("-inf"))
    hidden = torch.full_like(bias[:, :1], float("-inf"))
    table = torch.cat([bias, hidden], 1).to(dtype)  # HIDDEN reads the last entry
    at = torch.where(entry == HIDDEN, bias.shape[1], entry)
    return table.index_select(1, at.flatten()).unflatten(1, entry.shape)


def _extra_scores(x: Operands, n: Neighborhood) -> Float[Tensor, "batch heads tokens extra"]:
    assert n.extra_k is not None
    scores = (x.q @ x.per_head(n.extra_k).transpose(-1, -2)).to(x.accumulator) * x.scale
    return scores if n.extra_bias is None else scores + n.extra_bias.to(scores.dtype)
