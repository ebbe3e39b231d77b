"""VMoBA: MoBA over boxes of a video or an image, with choices made within a row, a head or across everything."""

from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.kernels.selectors.blocks import at_least, pairs
from vlm.kernels.selectors.order import Order, boxes
from vlm.kernels.sparse.lists import BlockLists

NAME = "vmoba"
SCOPES = ("query_head", "head_global", "overall", "block")
SMALL = 1e-6  # the official guard against a division by 0


@torch.no_grad()
def vmoba(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    grid: tuple[int, int, int],
    box: float | tuple[int, int] | tuple[int, int, int],
    topk: int | None = None,
    threshold: float = 0.25,
    scope: str = "query_head",
) -> tuple[BlockLists, Order]:
    """Wu et al. 2025, VMoBA: Mixture-of-Block Attention for Video Diffusion Models (arXiv 2506.23858), section 3.

    Args:
        grid: (frames, height, width) in tokens; an image has one frame.
        box: a number of frames, whole or part (1-D: stretches of tokens, the last may be shorter); (height, width)
            across all frames (2-D); or (frames, height, width) (3-D). The paper takes the three in turn, by layer.
        topk: how many blocks per row, its own included; over a scope of several rows as many on average. ``None``
            chooses by ``threshold``.
        threshold: the gates of a scope, moved to 0..1, are taken from the highest down until what is taken, the
            rows' own blocks first, makes this share of their sum; at least one block is added, as in the official code.
        scope: what competes: the blocks of a row (``"query_head"``), of all rows of a head (``"head_global"``), of all
            rows and heads (``"overall"``), or the rows of all heads for one block (``"block"``, by threshold only).

    The gate is q . mean(keys of the box); not causal; each row chooses for itself, its own block always among them.
    The lists are for tokens in box order::

        lists, order = vmoba(q, k, grid=(8, 16, 16), box=(4, 4))
        out = block_sparse_attention(order.apply(q), order.apply(k), order.apply(v), lists, causal=False)
        out = order.undo(out)

    Checked against the official code, with two differences: each sample chooses for itself (there packed samples
    share the scopes ``overall``), and ``topk=1`` means own blocks only (there it falls back to full attention).

    Raises:
        ValueError: tokens that are not the grid's, a grid that is not a multiple of the box, ``topk`` below 1, or an
            unknown scope.
    """
    tokens = prod(grid)
    if q.shape[2] != tokens or k.shape[2] != tokens:
        raise ValueError(f"{NAME}: grid {grid} has {tokens} tokens; found {q.shape[2]} rows, {k.shape[2]} keys")
    if scope not in SCOPES or (topk is not None and scope == "block"):
        known = ", ".join(SCOPES if topk is None else SCOPES[:3])
        raise ValueError(f"{NAME}: scope must be one of {known}; found {scope!r}")
    at_least(NAME, 1, topk=1 if topk is None else topk)
    order, block = partition(grid, box, q.device)
    p = pairs(NAME, order.apply(q), order.apply(k), 1, block, {"causal": False})
    gate = p.x.q.to(p.x.accumulator) @ p.key_means().transpose(-1, -2)  # [B,H,Q,key blocks]
    own, like = p.own().expand_as(gate), gate
    gate, own = (_grouped(each, scope) for each in (gate, own))  # [..., what competes]
    if topk is None:
        chosen = by_threshold(gate, own, threshold)
    else:
        chosen = by_count(gate, own, topk * gate.shape[-1] // p.key_numbers().numel())
    return p.lists(_ungrouped(chosen, scope, like)), order


def partition(
    grid: tuple[int, int, int], box: float | tuple[int, int] | tuple[int, int, int], device: torch.device
) -> tuple[Order, int]:
    """The order in which the tokens of a box lie together, and how many they are."""
    if isinstance(box, int | float):
        tokens = int(box * grid[1] * grid[2])
        if tokens < 1:
            raise ValueError(f"{NAME}: box must hold a token or more; found {box} frames of {grid[1]} x {grid[2]}")
        return Order.of(torch.arange(prod(grid), device=device)), tokens
    size = (grid[0], *box) if len(box) == 2 else tuple(box)
    return boxes(NAME, grid, size, device), prod(size)


def _grouped(x: Tensor, scope: str) -> Tensor:
    """[B,H,Q,blocks] -> [..., what competes]."""
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)
    return x if scope == "query_head" else x.flatten(2 if scope == "head_global" else 1)


def _ungrouped(x: Tensor, scope: str, like: Tensor) -> Tensor:
    """What :func:`_grouped` made of a tensor of the shape of ``like``, back in that shape."""
    if scope == "block":
        return x.unflatten(2, like.shape[1:3]).permute(0, 2, 3, 1)
    return x.view_as(like)


def by_count(
    gate: Float[Tensor, "*scopes candidates"], own: Bool[Tensor, "*scopes candidates"], count: int
) -> Bool[Tensor, "*scopes candidates"]:
    """The ``count`` highest gates of each scope, own blocks before all others."""
    order = gate.masked_fill(own, float("inf")).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(own).scatter_(-1, order[..., :count], True) | own


def by_threshold(
    gate: Float[Tensor, "*scopes candidates"], own: Bool[Tensor, "*scopes candidates"], threshold: float
) -> Bool[Tensor, "*scopes candidates"]:
    """Own blocks, and the highest others down to the one with which the share of all reaches the threshold."""
    low, high = gate.amin(-1, keepdim=True), gate.amax(-1, keepdim=True)
    spread = high - low
    gate = (gate - low) / torch.where(spread <= SMALL, 1, spread)
    total = gate.sum(-1, keepdim=True) + SMALL
    missing = threshold - (gate * own).sum(-1, keepdim=True) / total
    others, order = gate.masked_fill(own, -1).sort(dim=-1, descending=True, stable=True)
    reached = others.clamp_min(0).cumsum(-1) / total
    before = torch.nn.functional.pad(reached, (1, 0))[..., :-1]  # the share of those ranked higher
    taken = before < missing.clamp_min(0)
    taken[..., 0] = True
    return torch.zeros_like(own).scatter_(-1, order, taken) | own
