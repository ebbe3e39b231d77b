"""Selectors that look at features: few tokens that differ, instead of many that repeat each other.

Every choice is per segment and independent of padding and of the other segments. Ties go to the earlier token.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.segments import cosine, descending, marks, numbers, places, ranks


def max_min_order(
    x: Float[Tensor, "segments tokens width"], valid: Bool[Tensor, "segments tokens"], picks: int
) -> Int[Tensor, "segments picks"]:
    """Greedy max-min diversity over cosine distance: the order in which tokens are picked.

    The first pick is the token farthest from its nearest other token; each next one is farthest from its
    nearest pick. Source: DivPrune (CVPR 2025), algorithm 1. O(tokens * picks).
    """
    distance = 1 - cosine(x, x)  # [S,P,P]
    others = distance.masked_fill(~valid[:, None, :], torch.inf)
    others.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = others.amin(2)  # to another token
    nearest = nearest.masked_fill(~valid, -torch.inf)
    order = []
    for step in range(picks):
        pick = nearest.argmax(1, keepdim=True)  # [S,1]
        order.append(pick)
        to_pick = distance.gather(2, pick[:, None, :].expand(-1, x.shape[1], -1)).squeeze(2)  # [S,P]
        nearest = to_pick.masked_fill(~valid, -torch.inf) if step == 0 else nearest.minimum(to_pick)
        nearest = nearest.scatter(1, pick, -torch.inf)  # and so it stays: never pick a token twice
    return torch.cat(order, 1) if order else nearest[:, :0].long()


def determinant_order(
    kernel: Float[Tensor, "segments tokens tokens"],
    valid: Bool[Tensor, "segments tokens"],
    picks: int,
    least: float = 1e-5,
) -> Int[Tensor, "segments picks"]:
    """Greedy choice of the subset with the largest determinant of ``kernel``: the order in which tokens are picked.

    Once every token lies in the span of those picked, but for a share of ``least`` of its square (the kernel's rank is
    used up), the rest is picked by the kernel's diagonal. CDPruner's code goes on with rounding errors instead.
    Source: Chen et al. (NeurIPS 2018), algorithm 1, as in CDPruner (NeurIPS 2025), section 3.3.
    """
    if not picks:
        return kernel[:, :0, 0].long()
    quality = torch.diagonal(kernel, dim1=1, dim2=2)  # [S,P]
    # squared distance to the span of the picks; -inf for what cannot be picked
    gain, floor = quality.masked_fill(~valid, -torch.inf), least * quality
    rows = kernel.new_empty(len(kernel), picks, kernel.shape[1])  # of the Cholesky factor, one for each pick
    order = torch.empty(len(kernel), picks, dtype=torch.long, device=kernel.device)
    useful = torch.empty_like(order, dtype=torch.bool)
    for step in range(picks):
        best, pick = gain.masked_fill(gain <= floor, -torch.inf).max(1, keepdim=True)  # [S,1]
        order[:, step : step + 1], useful[:, step : step + 1] = pick, best > -torch.inf
        known, at = rows[:, :step], pick[:, None]
        # not a product of matrices, which may round equal tokens differently and so break ties
        row = (known.gather(2, at.expand(-1, step, 1)) * known).sum(1)  # [S,P]
        row = kernel.gather(1, at.expand(-1, 1, kernel.shape[1])).squeeze(1) - row
        row = torch.where(useful[:, step : step + 1], row / best.clamp_min(0).sqrt(), 0.0)
        rows[:, step] = row
        gain = gain.addcmul(row, row, value=-1).scatter(1, pick, -torch.inf)
    # Once nothing is useful nothing will be: the rest is what is left, best first.
    number, found = torch.arange(picks, device=kernel.device), useful.sum(1, keepdim=True)
    picked = marks(order, valid, found[:, 0])
    rest = descending(quality, valid & ~picked).gather(1, (number - found).clamp_min(0))
    return torch.where(useful, order, rest)


def walk(
    x: Float[Tensor, "segments tokens width"],
    score: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    count: Int[Tensor, " segments"],
    slope: Float[Tensor, " segments"],
    largest: float = 0.9,
    step: Literal["rank", "picked"] = "rank",
) -> Bool[Tensor, "segments tokens"]:
    """Take tokens from the best score on; each one taken strikes out those too near to it.

    Too near is a cosine distance below ``min(largest, i * slope)``. i is the rank of the taken token among all,
    from 1 (``step="rank"``), or the number of tokens taken with it (``"picked"``): the paper's page can be read both
    ways. AgilePruner's slope is ``0.01 * effective rank / mean effective rank of the data``. When too few remain, the
    best of those struck out return.

    Source: AgilePruner (ICLR 2026), project page. Reconstructed: no code is published; ``largest`` and the return are
    ours.
    """
    rank, distance = ranks(score, valid), 1 - cosine(x, x)
    alive, picked = valid, torch.zeros_like(valid)
    for taken in range(int(count.max()) if count.numel() else 0):
        first, token = rank.masked_fill(~alive, score.shape[1]).min(1, keepdim=True)  # [S,1] of those that are left
        takes = (first < score.shape[1]) & (taken < count[:, None])
        picked = picked | torch.zeros_like(valid).scatter(1, token, takes)
        radius = (first + 1 if step == "rank" else taken + 1) * slope[:, None]
        near = distance.gather(1, token[:, None].expand(-1, 1, score.shape[1])).squeeze(1)
        near = (near < radius.clamp_max(largest)).scatter(1, token, True)
        alive = alive & ~(near & takes)
    again = ranks(score, valid & ~picked)
    return picked | ((again < (count - picked.sum(1))[:, None]) & valid & ~picked)


def without_twins(
    x: Float[Tensor, "segments tokens width"],
    score: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    count: Int[Tensor, " segments"],
    at_once: int = 8,
) -> Bool[Tensor, "segments tokens"]:
    """Strike out tokens that have a twin until ``count[s]`` remain.

    The tokens, best score first, are split in turn into two halves; of the first half, the ``at_once`` tokens most
    alike to one of the second half go, and the rest of it stands before the second half, most alike first, for the
    next round. Source: VisPruner (ICCV 2025), section 3.3 and official code (which stops with an error where the list
    is odd; here the halves may differ by one).
    """
    order = descending(score, valid)  # the list of each segment: its first ``lengths`` places
    lengths, goals, similarity = valid.sum(1).tolist(), count.tolist(), cosine(x, x).flatten(1)
    while any(length > goal for length, goal in zip(lengths, goals, strict=True)):
        pairs = zip(lengths, goals, strict=True)
        goes = [min(max(length - goal, 0), at_once, (length + 1) // 2) for length, goal in pairs]
        length, gone = count.new_tensor(lengths)[:, None], count.new_tensor(goes)[:, None]  # [S,1]
        order = order[:, : max(lengths)]
        place = torch.arange(order.shape[1], device=x.device)
        there = place < length
        first, second = order[:, 0::2], order[:, 1::2]
        between = (first[:, :, None] * x.shape[1] + second[:, None]).flatten(1)
        alike = similarity.gather(1, between).unflatten(1, (first.shape[1], second.shape[1]))
        alike = alike.masked_fill(~there[:, None, 1::2], -torch.inf)
        alike = alike.amax(2) if alike.shape[2] else alike.new_zeros(first.shape)
        best = descending(alike, there[:, 0::2])
        stays = there[:, 0::2] & (place[: first.shape[1]] >= gone)  # of the first half, most alike first
        both = torch.cat([first.gather(1, best), second], 1)
        behind = (~torch.cat([stays, there[:, 1::2]], 1)).int().argsort(dim=1, stable=True)
        order = torch.where(gone > 0, both.gather(1, behind), order)  # a list that is short enough keeps its order
        lengths = [length - some for length, some in zip(lengths, goes, strict=True)]
    last = torch.arange(order.shape[1], device=x.device) < count.new_tensor(lengths)[:, None]
    return torch.zeros_like(valid).scatter(1, order, last)


def important_and_different(
    x: Float[Tensor, "segments tokens width"],
    score: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    count: Int[Tensor, " segments"],
    share: float = 0.5,
    at_once: int = 8,
) -> Bool[Tensor, "segments tokens"]:
    """The best ``share`` of the budget by score, the rest from the others :func:`without_twins`.

    Source: VisPruner (ICCV 2025), section 3; ``share=1`` is FasterVLM (arXiv 2412.01818, first version).
    """
    important = (ranks(score, valid) < (count.double() * share).long()[:, None]) & valid
    others = valid & ~important
    return important | without_twins(x, score, others, (count - important.sum(1)).minimum(others.sum(1)), at_once)


def unlike_pivots(
    x: Float[Tensor, "segments tokens width"],
    valid: Bool[Tensor, "segments tokens"],
    own: Bool[Tensor, "segments tokens"],
    others: Float[Tensor, "segments pivots width"],
    others_valid: Bool[Tensor, "segments pivots"],
    count: Int[Tensor, " segments"],
    turns: Int[Tensor, "segments turns"] | None = None,
) -> Bool[Tensor, "segments tokens"]:
    """Keep the pivots among the tokens and, for each pivot in turn, the tokens least alike to it.

    own: pivots among the tokens (they stay, and come first); others: features of pivots elsewhere, such as text.
    The budget left after ``own`` is divided evenly, the first pivots getting what does not divide. DART keeps
    ``4 + 8 * (share * tokens // 8)`` tokens, 4 more than asked; here ``count`` is what is kept (a segment with no
    pivot at all keeps none).

    turns: in which order the pivots choose, as numbers into ``own`` (ascending) followed by ``others``; that order
    itself if not given. DART's code takes the order in which a Python set happens to hold the indices.
    Source: DART (EMNLP 2025), algorithm 1, as ported by LightCompress (pivots in ascending order).
    """
    own = own & valid & (numbers(own) < count[:, None])
    index, real = places(own)  # [S,A]
    mine = cosine(x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), x)
    likeness, real = torch.cat([mine, cosine(others, x)], 1), torch.cat([real, others_valid], 1)  # [S,A+Q,P]
    if turns is not None:
        likeness = likeness.gather(1, turns[..., None].expand(-1, -1, x.shape[1]))
        real = real.gather(1, turns)
    left, pivots = count - own.sum(1), real.sum(1).clamp_min(1)
    number = numbers(real)
    quota = torch.where(real, left[:, None] // pivots[:, None] + (number < (left % pivots)[:, None]), 0)
    kept = own
    for turn in range(real.shape[1]):
        candidates = valid & ~kept
        kept = kept | ((ranks(-likeness[:, turn], candidates) < quota[:, turn, None]) & candidates)
    return kept
