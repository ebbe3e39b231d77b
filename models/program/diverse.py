"""Selectors that look at features: few tokens that differ, instead of many that repeat each other.

Every choice is per segment and independent of padding and of the other segments. Ties go to the earlier token.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.segments import cosine, descending, marks, numbers, places, ranks, rows_at


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
    floor, nothing = least * quality, kernel.new_tensor(-torch.inf)
    gain = quality.masked_fill(~valid, -torch.inf)  # squared distance to the span of the picks
    rows = kernel.new_zeros(len(kernel), picks, kernel.shape[1])  # of the Cholesky factor, one for each pick
    segment = torch.arange(len(kernel), device=kernel.device)[:, None]
    order, best = [], []
    for step in range(picks):
        most, pick = torch.where(gain > floor, gain, nothing).max(1, keepdim=True)  # [S,1]
        order.append(pick)
        best.append(most)
        so_far = rows[:, :step]
        known = so_far.transpose(1, 2)[segment, pick] @ so_far  # [S,1,P]
        row = ((kernel[segment, pick] - known) / most[..., None].sqrt()).squeeze(1)  # no number once nothing is useful
        rows[:, step] = row
        gain = torch.addcmul(gain, row, row, value=-1).scatter_(1, pick, -torch.inf)
    found, useful = torch.cat(order, 1), (torch.cat(best, 1) > 0).sum(1)
    rest = descending(quality, valid & ~marks(found, valid, useful))[:, :picks]
    behind = torch.arange(picks, device=kernel.device) - useful[:, None]
    return torch.where(behind < 0, found, rest.gather(1, behind.clamp(0, rest.shape[1] - 1)))


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
    order, rank = descending(score, valid), ranks(score, valid)
    distance = 1 - cosine(x, x)
    alive, picked = valid, torch.zeros_like(valid)
    for i in range(score.shape[1]):
        token = order[:, i : i + 1]  # [S,1]
        taken = alive.gather(1, token) & (picked.sum(1, keepdim=True) < count[:, None])
        picked = picked.scatter(1, token, taken)
        number = picked.sum(1) if step == "picked" else torch.full_like(count, i + 1)
        radius = (number * slope).clamp_max(largest)[:, None]
        near = distance.gather(2, token[:, None, :].expand(-1, score.shape[1], -1)).squeeze(2) < radius
        alive = alive & ~(taken & near & (rank > i))
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
    order, x = descending(score, valid), x.masked_fill(~valid[..., None], 0)
    similarity = cosine(x, x)
    length, most = valid.sum(1).tolist(), count.tolist()  # the list of each segment: order[:, :length]
    while any(n > m for n, m in zip(length, most, strict=True)):
        order = order[:, : max(length)]
        gone = [max(0, min(n - m, at_once, (n + 1) // 2)) for n, m in zip(length, most, strict=True)]
        if len(set(length)) > 1 or len(set(gone)) > 1:
            order = _next_round(order, similarity, order.new_tensor(length)[:, None], order.new_tensor(gone)[:, None])
        else:  # no list has padding
            first, second = order[:, ::2], order[:, 1::2]
            rest = _to_any(similarity, first, second).argsort(dim=1, descending=True, stable=True)[:, gone[0] :]
            order = torch.cat([first.gather(1, rest), second], 1)
        length = [n - g for n, g in zip(length, gone, strict=True)]
    return marks(order, valid, order.new_tensor(length))


def _next_round(
    order: Int[Tensor, "segments places"],
    similarity: Float[Tensor, "segments tokens tokens"],
    length: Int[Tensor, "segments 1"],
    gone: Int[Tensor, "segments 1"],
) -> Int[Tensor, "segments places"]:
    """The lists of :func:`without_twins` after a round where they have lengths of their own; one that loses nothing
    stays as it is."""
    place = torch.arange(order.shape[1], device=order.device)
    there, half = place < length, (order.shape[1] + 1) // 2
    first, second = order[:, ::2], order[:, 1::2]
    alike = _to_any(similarity, first, second.masked_fill(~there[:, 1::2], similarity.shape[2]))
    best = alike.masked_fill(~there[:, ::2], -torch.inf).argsort(dim=1, descending=True, stable=True)
    both = torch.cat([first.gather(1, best), second], 1)
    left = (length + 1) // 2 - gone  # of the first half
    source = torch.where(place < left, place + gone, half + place - left).clamp_max(order.shape[1] - 1)
    return torch.where(gone > 0, both.gather(1, source), order)


def _to_any(
    similarity: Float[Tensor, "segments tokens tokens"],
    first: Int[Tensor, "segments first"],
    second: Int[Tensor, "segments second"],
) -> Float[Tensor, "segments first"]:
    """The largest similarity of each of the first to any of the second; one beyond the tokens is none."""
    tokens = similarity.shape[2]
    hidden = similarity.new_full((len(first), tokens + 1), -torch.inf).scatter_(1, second, 0.0)[:, :tokens]
    return rows_at(similarity, first).add_(hidden[:, None]).amax(2)


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
