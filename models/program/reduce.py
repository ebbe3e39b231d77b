"""Reducers: what becomes of the tokens that are not kept.

A reducer maps features and marks of kept tokens to the features of fewer places. Gradients flow through the features.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.clusters import density_peaks
from vlm.models.program.segments import cosine, numbers, places, ranks, rows_at, weighted_sums


class Reduced(NamedTuple):
    """Fewer tokens, in ascending order of ``place`` with padding last; a merged token stands after the kept one at
    the same place.

    place: the token of the segment that each stands for: a kept token itself, a merged one its target, centre or (for
    the rest of an image) the heaviest of its tokens. Positions and grid coordinates are gathered by it.
    size: how many tokens each is the mean of, None where features are no means. Padding has features and size 0.
    """

    place: Int[Tensor, "segments reduced"]
    features: Float[Tensor, "segments reduced width"]
    valid: Bool[Tensor, "segments reduced"]
    size: Float[Tensor, "segments reduced"] | None = None


def reduced(
    place: Int[Tensor, "segments reduced"],
    features: Float[Tensor, "segments reduced width"],
    valid: Bool[Tensor, "segments reduced"],
    size: Float[Tensor, "segments reduced"] | None = None,
) -> Reduced:
    """A :class:`Reduced` with nothing in its padding."""
    features = features.masked_fill(~valid[..., None], 0)
    return Reduced(place, features, valid, None if size is None else size.masked_fill(~valid, 0))


def drop(
    x: Float[Tensor, "segments tokens width"],
    valid: Bool[Tensor, "segments tokens"],
    kept: Bool[Tensor, "segments tokens"],
) -> Reduced:
    """The kept tokens as they are; nothing of the others."""
    place, there = places(kept & valid)
    return reduced(place, rows_at(x, place), there)


def average_into_nearest(
    x: Float[Tensor, "segments tokens width"],
    valid: Bool[Tensor, "segments tokens"],
    kept: Bool[Tensor, "segments tokens"],
) -> Reduced:
    """Each dropped token joins the kept one most alike to it (cosine); a kept token becomes the mean of its group.

    Source: VScan (TMLR 2026), section 3.1.
    """
    place, there = places(kept & valid)
    join = _nearest(cosine(x, rows_at(x, place)), there, valid & ~kept)  # [S,P,K] 0/1
    size = 1 + join.sum(1)
    features = (rows_at(x, place) + weighted_sums(join.transpose(1, 2), x, valid)) / size[..., None].to(x.dtype)
    return reduced(place, features, there, size)


def add_contextual(
    x: Float[Tensor, "segments tokens width"],
    key: Float[Tensor, "segments tokens key_width"],
    valid: Bool[Tensor, "segments tokens"],
    kept: Bool[Tensor, "segments tokens"],
    count: Int[Tensor, " segments"],
) -> Reduced:
    """The kept tokens, and ``count[s]`` contextual ones that the others are gathered in.

    Of the n others, number 0, step, 2 step ... with ``step = max(1, n // count)`` are targets; each other one joins
    the target most alike to it by its key (cosine). A contextual token is its target plus the mean of those that
    joined: a sum of two, as in the official code, so that its norm is larger. Source: VisionZip (CVPR 2025), 3.2.
    """
    others = valid & ~kept
    n = others.sum(1, keepdim=True)
    step = (n // count[:, None].clamp_min(1)).clamp_min(1)
    number = numbers(others)
    target = others & (number % step == 0) & (number // step < count[:, None])
    place, there = places(target)
    join = _nearest(cosine(key, rows_at(key, place)), there, others & ~target)
    mean = join / join.sum(1, keepdim=True).clamp_min(1)
    context = Reduced(place, rows_at(x, place) + weighted_sums(mean.transpose(1, 2), x, valid), there)
    return _together(drop(x, valid, kept), context)


def add_weighted_neighbours(
    x: Float[Tensor, "segments tokens width"],
    key: Float[Tensor, "segments tokens key_width"],
    weight: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    kept: Bool[Tensor, "segments tokens"],
    neighbours: int = 32,
) -> Reduced:
    """To each kept token the weighted sum of its nearest tokens, and one token more for all that were dropped.

    Neighbours are the ``neighbours`` tokens of most alike keys (cosine), kept ones among them, and the sum is neither
    normalised nor of merged features. The extra token is the weighted sum of the dropped tokens and stands at the
    heaviest of them. A segment that keeps everything stays as it is.
    Source: LLaVA-PruMerge (arXiv 2403.15388), section 3.3; the extra token is the code's.
    """
    kept = kept & valid
    dropped = valid & ~kept
    place, there = places(kept)
    likeness = cosine(rows_at(key, place), key)  # [S,K,P]
    itself = place[..., None] == torch.arange(x.shape[1], device=x.device)
    candidate = valid[:, None] & ~itself & dropped.any(1)[:, None, None]
    near = _most_alike(likeness.masked_fill(~candidate, -torch.inf), neighbours) & candidate
    weight = weight.to(likeness.dtype)
    merged = Reduced(place, rows_at(x, place) + weighted_sums(near * weight[:, None], x, valid), there)
    share = (weight * dropped)[:, None]  # [S,1,P]
    heaviest = weight.masked_fill(~dropped, -torch.inf).argmax(1, keepdim=True)
    return _together(merged, Reduced(heaviest, weighted_sums(share, x, valid), dropped.any(1, keepdim=True)))


def add_clusters(
    x: Float[Tensor, "segments tokens width"],
    score: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    kept: Bool[Tensor, "segments tokens"],
    share: float = 0.3,
    tokens_per_cluster: int = 10,
    most: Int[Tensor, " segments"] | None = None,
) -> Reduced:
    """The kept tokens, and the means of clusters of the best of the dropped ones.

    Of n dropped tokens the ``int(share n) + 1`` of largest score are recycled, into ``int(recycled / 10) + 1``
    clusters (:func:`~vlm.models.program.clusters.density_peaks`), but not more than ``most``, each at the place of its
    centre. Means are divided by the exact size (the code adds 1e-6 to it). Source: SparseVLM (ICML 2025), section 3.4
    and official code.
    """
    dropped = valid & ~kept
    recycled, clusters = clusters_of(dropped.sum(1), share, tokens_per_cluster)
    index, again = places((ranks(score, dropped) < recycled[:, None]) & dropped)  # [S,T], few of the tokens
    clusters = clusters if most is None else clusters.minimum(most)
    few = rows_at(x, index)  # distances are between these only
    centre, cluster = density_peaks(few.detach(), again, clusters)
    place, there = places(centre)  # [S,C] among the few
    join = (cluster[..., None] == place[:, None]) & again[..., None] & there[:, None]
    size = join.sum(1)
    mean = join.double() / size[:, None].clamp_min(1)
    means = weighted_sums(mean.transpose(1, 2), few, again)
    return _together(drop(x, valid, kept), Reduced(index.gather(1, place), means, there))


def clusters_of(
    dropped: Int[Tensor, "*batch"], share: float = 0.3, tokens_per_cluster: int = 10
) -> tuple[Int[Tensor, "*batch"], Int[Tensor, "*batch"]]:
    """How many of ``dropped`` tokens :func:`add_clusters` recycles, and into how many clusters."""
    recycled = torch.where(dropped > 0, (dropped.double() * share + 1e-9).long() + 1, 0)
    return recycled, torch.where(dropped > 0, recycled // tokens_per_cluster + 1, 0)


def _most_alike(likeness: Float[Tensor, "*rows tokens"], count: int) -> Bool[Tensor, "*rows tokens"]:
    """The ``count`` largest of each row, the earlier of a tie: by the smallest that belongs to them, without a sort."""
    count = min(count, likeness.shape[-1])
    if not count:
        return torch.zeros_like(likeness, dtype=torch.bool)
    least = likeness.topk(count).values[..., -1:]
    above, level = likeness > least, likeness == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _nearest(
    likeness: Float[Tensor, "segments tokens reduced"],
    there: Bool[Tensor, "segments reduced"],
    joining: Bool[Tensor, "segments tokens"],
) -> Float[Tensor, "segments tokens reduced"]:
    """1 where a joining token's nearest target stands, 0 elsewhere."""
    if not likeness.shape[2]:
        return likeness
    nearest = likeness.masked_fill(~there[:, None], -torch.inf).argmax(2)
    join = torch.zeros_like(likeness).scatter(2, nearest[..., None], 1)
    return join * (joining & there.any(1, keepdim=True))[..., None]


def _together(kept: Reduced, more: Reduced) -> Reduced:
    """Both sets of tokens in one, by ascending place and with as little padding as possible."""
    place, there = torch.cat([kept.place, more.place], 1), torch.cat([kept.valid, more.valid], 1)
    features = torch.cat([kept.features, more.features], 1)
    order = place.masked_fill(~there, torch.iinfo(place.dtype).max).argsort(dim=1, stable=True)
    order = order[:, : int(there.sum(1).max()) if there.numel() else 0]
    return reduced(place.gather(1, order), rows_at(features, order), there.gather(1, order))
