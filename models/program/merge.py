"""Token merging inside an encoder: the most alike pairs become one token each, block after block."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.reduce import Reduced, reduced
from vlm.models.program.segments import cosine, numbers, places, ranks, rows_at, weighted_sums


def merging_away(
    metric: Float[Tensor, "segments tokens key_width"],
    valid: Bool[Tensor, "segments tokens"],
    merges: Int[Tensor, " segments"],
    class_token: bool = False,
    before: int = 0,
) -> tuple[Bool[Tensor, "segments tokens"], Int[Tensor, "segments tokens"]]:
    """Which tokens :func:`merge_pairs` merges into another, and the one that each is most alike to."""
    number = numbers(valid) + before
    first, second = valid & (number % 2 == 0), valid & (number % 2 == 1)
    likeness = cosine(metric, metric).masked_fill(~second[:, None], -torch.inf)
    best, partner = likeness.max(2)
    free = first & ~(class_token & (number == 0)) & second.any(1, keepdim=True)
    return (ranks(best, free) < merges.minimum(valid.sum(1) // 2)[:, None]) & free, partner


def merge_pairs(
    x: Float[Tensor, "segments tokens width"],
    metric: Float[Tensor, "segments tokens key_width"],
    size: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    merges: Int[Tensor, " segments"],
    class_token: bool = False,
    before: int = 0,
) -> Reduced:
    """Merge ``merges[s]`` pairs of each segment: features become means weighted by ``size``, sizes add up.

    Tokens are split in turn into two halves; each of the first half finds the most alike of the second (cosine of
    ``metric``, the mean of the keys over heads), and the most alike pairs merge, at the place of the second. At most
    half of the tokens merge. class_token: the first token of each segment never merges into another. before: tokens
    that stand before each segment and take no part, but are counted when tokens are split in turn.
    A following block adds ``log size`` to the logits of its keys (proportional attention).

    Tokens come back in their order (the published code puts the first half before the second).
    Source: ToMe (ICLR 2023), section 3.
    """
    gone, partner = merging_away(metric, valid, merges, class_token, before)
    index = torch.arange(x.shape[1], device=x.device)
    target = torch.where(gone, partner, index)  # [S,P]
    place, there = places(valid & ~gone)
    join = (target[:, None] == place[..., None]) & valid[:, None] & there[..., None]  # [S,K,P]
    weight = join * size.to(torch.promote_types(x.dtype, torch.float32))[:, None]
    total = weight.sum(2)
    mean = weighted_sums(weight / total[..., None].clamp_min(1e-30), x, valid)
    alone = (join.sum(2) == 1)[..., None]  # bit for bit as it was
    features = torch.where(alone, rows_at(x, place), mean)
    return reduced(place, features, there, total.to(size.dtype))


def merges_per_block(blocks: int, mean: float, inflection: float = 0.0) -> list[int]:
    """Merges of each block: ``mean`` on average, falling or rising linearly over the blocks.

    inflection: -1 takes from ``2 mean`` in the first block down to 0 in the last, 0 the same in each, 1 up from 0.
    Source: ToMe (ICLR 2023), appendix; official code's ``parse_r``.
    """
    low = int(mean * (1 - inflection))
    if blocks == 1:
        return [int(mean)]
    step = (2 * mean - low - low) / (blocks - 1)
    return [int(low + step * block) for block in range(blocks)]


def counts_to(keep: int, total: int, blocks: int, inflection: float = 0.0) -> list[int]:
    """Tokens left after each of ``blocks`` blocks so that ``keep`` of ``total`` are left at the end.

    As :func:`merges_per_block` has it, as far as whole numbers and the limit of half of the tokens in each block allow.
    Raises ModelError when so many blocks cannot merge so much.
    """
    if keep * 2**blocks < total:
        least = -(-total // 2**blocks)
        raise ModelError(f"merging: expected at least {least} of {total} tokens after {blocks} blocks; found {keep}")
    plan = merges_per_block(blocks, (total - keep) / blocks, inflection)
    rest = total - keep - sum(plan)  # what was rounded down, one each to the first blocks
    left = planned = total
    counts = []
    for block, merges in enumerate(plan):
        planned -= merges + (block < rest)
        most = keep * 2 ** (blocks - 1 - block)  # from which the blocks that follow still come down to ``keep``
        left = max(min(planned, most), -(-left // 2), keep)
        counts.append(left)
    return counts
