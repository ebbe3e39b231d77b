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
) -> Bool[Tensor, "segments tokens"]:
    """Which tokens :func:`merge_pairs` merges into another one."""
    first, second = halves(valid, before)
    place, there = places(first)
    likeness, _ = _likeness(metric, place, second)  # [S,F,O]
    best = likeness.amax(2) if likeness.shape[2] else likeness.sum(2)
    free = there & second.any(1, keepdim=True)
    if class_token and not before:
        free = free & (place != first.int().argmax(1, keepdim=True))
    gone = (ranks(best, free) < merges.minimum(valid.sum(1) // 2)[:, None]) & free
    return torch.zeros_like(valid).scatter(1, place, gone)


def halves(
    valid: Bool[Tensor, "segments tokens"], before: int = 0
) -> tuple[Bool[Tensor, "segments tokens"], Bool[Tensor, "segments tokens"]]:
    """Every second token from the first of each segment on, and the others; ``before`` tokens stand before it."""
    odd = (numbers(valid) + before) % 2 == 1
    return valid & ~odd, valid & odd


def _likeness(
    metric: Float[Tensor, "segments tokens key_width"],
    place: Int[Tensor, "segments some"],
    among: Bool[Tensor, "segments tokens"],
) -> tuple[Float[Tensor, "segments some marked"], Int[Tensor, "segments marked"]]:
    """Cosines of the tokens at ``place`` to those that ``among`` marks (-inf to padding), and where these are."""
    other, real = places(among)
    marked = rows_at(metric, other).masked_fill(~real[..., None], 0)
    hidden = torch.zeros_like(real, dtype=torch.float32).masked_fill_(~real, -torch.inf)
    return cosine(rows_at(metric, place), marked) + hidden[:, None], other


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
    return merge_away(x, metric, size, valid, merging_away(metric, valid, merges, class_token, before), before)


def merge_away(
    x: Float[Tensor, "segments tokens width"],
    metric: Float[Tensor, "segments tokens key_width"],
    size: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    gone: Bool[Tensor, "segments tokens"],
    before: int = 0,
) -> Reduced:
    """Merge the tokens that :func:`merging_away` marked, each into the one that it is most alike to."""
    tokens, (source, joins) = x.shape[1], places(gone)
    place, there = places(valid & ~gone)
    if not source.shape[1]:
        return reduced(place, rows_at(x, place), there, size.gather(1, place))
    likeness, other = _likeness(metric, source, halves(valid, before)[1])
    partner = other.gather(1, likeness.argmax(2))  # [S,M]
    wide = torch.promote_types(x.dtype, torch.float32)
    together = (partner[..., None] == partner[:, None]) & joins[:, None]  # [S,M,M] which merge into the same one
    weight = together * size.gather(1, source).to(wide)[:, None]
    own = size.gather(1, partner).to(wide)
    total = own + weight.sum(2)
    more = weighted_sums(weight, rows_at(x, source).to(wide), joins)
    mean = (own[..., None] * rows_at(x, partner) + more) / total[..., None].clamp_min(1e-30)
    # Of several that merge into one, the first carries their mean; a token that none joins stays as it is, to the bit.
    number = tokens + torch.arange(source.shape[1], device=x.device).expand(source.shape)
    carrier = torch.full((len(x), tokens + 1), 2 * tokens, device=x.device)
    carrier = carrier.scatter_reduce(1, torch.where(joins, partner, tokens), number, "amin").gather(1, place)
    carrier = torch.where(carrier < 2 * tokens, carrier, place)
    features = rows_at(torch.cat([x, mean.to(x.dtype)], 1), carrier)
    return reduced(place, features, there, torch.cat([size, total.to(size.dtype)], 1).gather(1, carrier))


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
