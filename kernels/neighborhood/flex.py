"""Neighborhood attention through FlexAttention, with the tokens of a dilation group brought together.

With dilation, raster order spreads the keys of every block of queries over nearly all blocks of keys; sorted by group
each group is a small grid of its own and few blocks are visited (56 x 56 tokens, window 7, dilation 8, blocks of 128:
73 of 625 instead of 409). Inside a group raster order stays: boxes of tokens visit more blocks than rows do on every
feature map up to 128 x 128 that we counted, and fewer only on larger grids and on videos.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast, no_type_check

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlm.kernels.flex import block_mask, flex, grouped_heads
from vlm.kernels.neighborhood.reference import Neighborhood, Result
from vlm.kernels.neighborhood.window import Axis, grid, lines
from vlm.kernels.plans import plan
from vlm.kernels.visibility import Operands, Visibility


class Sorted(NamedTuple):
    """Tokens by dilation group; what the mask and the bias look up for each, in that order."""

    order: Int[Tensor, " tokens"]  # the token that stands at each position
    position: Int[Tensor, " tokens"]  # where each token stands
    group: Int[Tensor, " tokens"]
    step: Int[Tensor, "axes tokens"]
    first: Int[Tensor, "axes tokens"]
    last: Int[Tensor, "axes tokens"]


Function = TypeVar("Function", bound=Callable[..., Any])


def kept(function: Function) -> Function:
    """Results are kept for each grid; a compiled graph breaks here rather than making them anew in every call."""
    return cast(Function, torch.compiler.disable(lru_cache(maxsize=32)(function)))


def neighborhood_flex(x: Operands, n: Neighborhood) -> Result:
    s = by_group(n.axes, x.q.device)
    dilated = any(axis.dilation > 1 for axis in n.axes)
    q, (k, v), extra = x.q, grouped_heads(x), 0
    if dilated:
        q, k, v = (y.index_select(2, s.order) for y in (q, k, v))
    if n.extra_k is not None and n.extra_v is not None:
        extra_k, extra_v = grouped_heads(replace(x, k=n.extra_k, v=n.extra_v))
        k, v, extra = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2), extra_k.shape[2]
    mask = _mask(n.axes, extra, q.device)
    out, lse = flex(q, k, v, score_mod=_score(n, s), block_mask=mask, scale=x.scale)
    if dilated:
        out, lse = out.index_select(2, s.position), lse.index_select(2, s.position)
    return out, lse if n.return_lse else None


@plan(Sorted, maxsize=32)
def by_group(axes: tuple[Axis, ...], device: torch.device) -> Sorted:
    axes = tuple(Axis(*axis) for axis in axes)  # a compiler hands over plain tuples
    coordinates = torch.meshgrid(*(torch.arange(axis.length) for axis in axes), indexing="ij")
    along = [lines(axis) for axis in axes]
    group = grid([line.group for line in along], [axis.dilation for axis in axes])
    order = group.argsort(stable=True)
    at = [c.flatten()[order] for c in coordinates]  # along each axis the coordinate of each token, in that order
    each = list(zip(along, at, strict=True))
    step = torch.stack([line.step[c] for line, c in each])
    first, last = torch.stack([line.first[c] for line, c in each]), torch.stack([line.last[c] for line, c in each])
    return Sorted(*(y.to(device) for y in (order, order.argsort(), group[order], step, first, last)))


@kept
def _mask(axes: tuple[Axis, ...], extra: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):
        _, _, group, step, first, last = by_group(axes, device)
        tokens, count = len(group), len(axes)

        @no_type_check  # a test's shape check would wrap it, and FlexAttention reads the arguments of what it gets
        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            key = j.clamp_max(tokens - 1)
            local = group[i] == group[key]
            for a in range(count):
                local = local & (first[a, i] <= step[a, key]) & (step[a, key] <= last[a, i])
            return local | (j >= tokens)

        return block_mask(seen, None, Visibility(tokens, tokens + extra, False, device))


def _score(n: Neighborhood, s: Sorted) -> Callable[..., Tensor] | None:
    """The biases as FlexAttention takes them; it evaluates them for hidden pairs too, hence the clamps."""
    if n.bias is None and n.extra_bias is None:
        return None
    tokens, bias = len(s.order), n.bias
    extra_bias = None if n.extra_bias is None else n.extra_bias.index_select(1, s.order)
    windows = [axis.window for axis in n.axes]
    step = s.step

    @no_type_check
    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key = j.clamp_max(tokens - 1)
        if bias is not None:
            entry = torch.zeros_like(key)
            for a, window in enumerate(windows):
                offset = step[a, key] - step[a, i] + window - 1
                entry = entry * (2 * window - 1) + offset.clamp(0, 2 * window - 2)
            value = value + torch.where(j < tokens, bias[h, entry], 0)
        if extra_bias is not None:
            value = value + torch.where(j < tokens, 0, extra_bias[h, i, (j - tokens).clamp_min(0)])
        return value

    return score
