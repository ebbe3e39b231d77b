"""Which cache entries each head keeps after the prompt: the KV-cache policies.

Pure functions from scores [batch, heads, keys] to marks of kept entries of the same shape. heads are key/value heads
(:func:`group_heads` takes query heads to them), keys are a layer's cache entries, and ``valid`` [batch, keys] says
which are real; padding stands at one end. The ``window`` last real entries, whose rows gave the scores, always stay.
Entries keep their rotary positions. Ties go to the earlier entry. Cache entries of the layer's own (a list per layer)
or of its heads (marks that differ in number) are divided in :mod:`vlm.models.program.kv_budget`.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.scores import standardised
from vlm.models.program.segments import numbers, places, ranks


def group_heads(
    score: Float[Tensor, "batch heads keys"], kv_heads: int, how: Literal["mean", "max"] = "mean"
) -> Float[Tensor, "batch kv_heads keys"]:
    """Scores of query heads taken together over the heads that share a key/value head.

    The published codes of SnapKV and its kin store a copy of the cache for each query head instead.
    """
    grouped = score.unflatten(1, (kv_heads, -1))
    return grouped.mean(2) if how == "mean" else grouped.amax(2)


def recent(valid: Bool[Tensor, "batch keys"], window: int | Int[Tensor, " batch"]) -> Bool[Tensor, "batch keys"]:
    """The last ``window`` real entries of each row."""
    window = torch.as_tensor(window, device=valid.device)[..., None]
    return valid & (numbers(valid) >= valid.sum(1, keepdim=True) - window)


def pooled(
    score: Float[Tensor, "batch heads keys"],
    valid: Bool[Tensor, "batch keys"],
    kernel: int,
    how: Literal["mean", "max"] = "mean",
) -> Float[Tensor, "batch heads keys"]:
    """Scores smoothed over ``kernel`` neighbours (odd), so that an entry brings its surroundings along.

    Beyond the ends there is nothing: 0 for the mean, which always divides by ``kernel``, and no candidate for the
    maximum. Raises ValueError for an even kernel. Source: SnapKV (NeurIPS 2024), section 4; official code.
    """
    if kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd number of neighbours; found {kernel}")
    if how == "mean":
        filled = score.masked_fill(~valid[:, None], 0)
        return torch.nn.functional.avg_pool1d(filled, kernel, 1, kernel // 2).masked_fill(~valid[:, None], 0)
    filled = score.masked_fill(~valid[:, None], torch.finfo(score.dtype).min)
    return torch.nn.functional.max_pool1d(filled, kernel, 1, kernel // 2).masked_fill(~valid[:, None], 0)


def top_entries(
    score: Float[Tensor, "batch heads keys"],
    candidates: Bool[Tensor, "batch keys"],
    count: int | Int[Tensor, " batch"] | Int[Tensor, "batch heads"],
) -> Bool[Tensor, "batch heads keys"]:
    """The ``count`` candidates of largest score of each head; a count for all, for each row, or for each head."""
    batch, heads, _ = score.shape
    each = torch.as_tensor(count, device=score.device)
    each = (each[:, None] if each.ndim == 1 else each).expand(batch, heads)
    wide = candidates[:, None].expand_as(score)
    rank = ranks(score.flatten(0, 1), wide.flatten(0, 1)).unflatten(0, (batch, heads))
    return (rank < each[..., None]) & wide


def observed(
    score: Float[Tensor, "batch heads keys"],
    valid: Bool[Tensor, "batch keys"],
    capacity: int | Int[Tensor, " batch"] | Int[Tensor, "batch heads"],
    window: int | Int[Tensor, " batch"] = 32,
    kernel: int = 5,
    pooling: Literal["mean", "max"] = "mean",
) -> Bool[Tensor, "batch heads keys"]:
    """SnapKV: the window and, of the entries before it, the best by what the window's rows paid them.

    score: attention received from the last ``window`` rows of the prompt (softmax over the whole prompt).
    capacity: entries to keep, the window among them; a prompt that is not longer stays whole. The mean over 5
    is the code's default, the maximum over 7 what its LongBench settings use. kernel 1 is no pooling: with scores
    received from all rows that is H2O at the end of the prompt (NeurIPS 2023; as in KVCache-Factory).
    Source: SnapKV (NeurIPS 2024), section 4.
    """
    last = recent(valid, window)
    before = valid & ~last
    each = torch.as_tensor(window, device=score.device).expand(len(score))
    limit = torch.as_tensor(capacity, device=score.device)
    limit = limit.expand(len(score)) if limit.ndim < 2 else limit
    prefix = (limit - (each if limit.ndim == 1 else each[:, None])).clamp_min(0)
    return top_entries(pooled(score, before, kernel, pooling), before, prefix) | last[:, None]


def first_and_recent(
    valid: Bool[Tensor, "batch keys"], sinks: int | Int[Tensor, " batch"], window: int | Int[Tensor, " batch"]
) -> Bool[Tensor, "batch keys"]:
    """StreamingLLM: the first ``sinks`` entries and the last ``window``, for all heads.

    The paper also counts positions anew inside the cache, which is the cache's matter: KVCache-Factory keeps them, and
    takes ``capacity - window`` first entries. Source: StreamingLLM (ICLR 2024), section 3.2.
    """
    first = numbers(valid) < torch.as_tensor(sinks, device=valid.device)[..., None]
    return (valid & first) | recent(valid, window)


def with_recent_share(
    score: Float[Tensor, "batch heads keys"],
    valid: Bool[Tensor, "batch keys"],
    capacity: Int[Tensor, " batch"],
    window_share: float = 0.1,
) -> Bool[Tensor, "batch heads keys"]:
    """VL-Cache: a ``window_share`` of the budget is the last entries, the rest the best by score.

    score: attention received from the rows after the image (:mod:`vlm.models.program.kv_budget` gives each layer its
    capacity). Source: VL-Cache (arXiv 2410.23317), section 4; read in a port (EffiVLM-Bench).
    """
    capacity = capacity.minimum(valid.sum(1))
    window = (capacity.double() * window_share).long()[:, None]
    last = valid & (numbers(valid) >= valid.sum(1, keepdim=True) - window)
    return top_entries(score, valid & ~last, capacity - last.sum(1)) | last[:, None]


def hidden_strength(
    norm: Float[Tensor, "batch keys"],
    latest: Bool[Tensor, "batch keys"],
    strength: float = 2.0,
    temperature: float = 3.5,
) -> Float[Tensor, "batch keys"]:
    """GUI-KV's bonus for entries of the latest image: softmax of the standardised norm of the layer's input.

    norm: L2, of what enters the layer's attention. Norms that differ by rounding alone are equal: without a learned
    gain the input norm makes them so. The class's own defaults are 0.1 and 1; its scripts set these.
    Source: GUI-KV (arXiv 2510.00536), section 3.1.
    """
    high = norm.masked_fill(~latest, 0).amax(1, keepdim=True)
    low = norm.masked_fill(~latest, torch.inf).amin(1, keepdim=True)
    standard = standardised(norm.float(), latest).masked_fill(high - low < 1e-5 * high, 0) / temperature
    share = standard.masked_fill(~latest, -torch.inf).softmax(1)
    return torch.where(latest, strength * share, 0)


def outside_span(
    key: Float[Tensor, "batch heads keys dim"], latest: Bool[Tensor, "batch keys"], rank: int = 32
) -> Float[Tensor, "batch heads keys"]:
    """Norm of what each key has outside the span of the first ``rank`` keys of the latest image.

    Small means that the latest image says the same; what is left by rounding alone counts as nothing. Source: GUI-KV
    (arXiv 2510.00536), section 3.2 (QR without pivoting, hence the first keys).
    """
    key = key if key.dtype == torch.float64 else key.float()
    index, there = places(latest & (numbers(latest) < rank))  # [B,R]
    if index.shape[1] == 0:
        return key.norm(dim=3)
    chosen = key.gather(2, index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
    chosen = chosen * there[:, None, :, None]
    left, values, _ = torch.linalg.svd(chosen.transpose(2, 3), full_matrices=False)  # [B,H,d,min(d,R)]
    left = left * (values > values.amax(-1, keepdim=True) * 1e-6)[..., None, :]
    rest = (key - key @ left @ left.transpose(2, 3)).norm(dim=3)
    return rest.masked_fill(rest < 1e-5 * key.norm(dim=3), 0)


def without_repeats(
    score: Float[Tensor, "batch heads keys"],
    residual: Float[Tensor, "batch heads keys"],
    older: Bool[Tensor, "batch keys"],
    share: float | Float[Tensor, " batch"],
) -> Float[Tensor, "batch heads keys"]:
    """Scores with 0 for the ``share`` of the older images' entries that have the smallest residual.

    GUI-KV's share is ``1 - capacity / length``, over all older images together; such an entry can still be kept where
    too few have a score. Source: GUI-KV (arXiv 2510.00536), section 3.2.
    """
    share = torch.as_tensor(share, device=score.device).expand(len(older))
    count = (older.sum(1) * share.double()).long()
    return score.masked_fill(top_entries(-residual, older, count), 0)


def semantic_distance(
    score: Float[Tensor, "batch heads keys"],
    value: Float[Tensor, "batch heads keys dim"],
    valid: Bool[Tensor, "batch keys"],
    count: int = 256,
) -> Float[Tensor, "batch heads"]:
    """How far each head's semantic vector lies from the mean of the heads: Task-KV's heterogeneous heads lie far.

    A head's vector sums its values at the ``count`` entries of largest score, weighted by the score (attention
    received from the last rows, mean over them). Source: Task-KV (arXiv 2501.15113), section 3.1. Reconstructed.
    """
    weight = score * top_entries(score, valid, count)
    vector = (weight[:, :, None] @ value.to(weight.dtype).masked_fill(~valid[:, None, :, None], 0)).squeeze(2)
    return (vector - vector.mean(1, keepdim=True)).norm(dim=2)


def some_heads_whole(
    score: Float[Tensor, "batch heads keys"],
    valid: Bool[Tensor, "batch keys"],
    distance: Float[Tensor, "batch heads"],
    whole: int,
    total: int | float | Int[Tensor, " batch"],
    sinks: int | Int[Tensor, " batch"] = 16,
    window: int | Int[Tensor, " batch"] = 256,
) -> Bool[Tensor, "batch heads keys"]:
    """Task-KV: the ``whole`` farthest heads keep everything, the others sinks, recent and the best middle entries.

    total: entries that the layer may keep over all heads. Where whole heads would take more than that, fewer heads
    stay whole. Source: Task-KV (arXiv 2501.15113), section 3.2. Reconstructed: whether the head nearest to the centre
    also stays whole is left open there, and it does not here.
    """
    heads = score.shape[1]
    n = valid.sum(1)
    ends = first_and_recent(valid, sinks, window)
    least = ends.sum(1)
    fits = ((total - heads * least) / (n - least).clamp_min(1)).floor().clamp(0, heads).long()
    full = torch.where(n > least, fits.clamp_max(whole), whole)
    middle = ((total - n * full) / (heads - full).clamp_min(1)).floor().long() - least
    kept = top_entries(score, valid & ~ends, middle.clamp_min(0)) | ends[:, None]
    far = ranks(distance, torch.ones_like(distance, dtype=torch.bool)) < full[:, None]
    return kept | (far[..., None] & valid[:, None])


def lightest(
    score: Float[Tensor, "batch heads keys"], candidates: Bool[Tensor, "batch heads keys"]
) -> Bool[Tensor, "batch heads keys"]:
    """The candidate of smallest score of each head, the earlier of a tie; none where there is no candidate.

    H2O evicts it at a decoding step: the smallest accumulated score outside the recent window (NeurIPS 2023,
    section 4). RefreshKV replaces it in the set that it reads (ACL 2025, section 3).
    """
    place = score.masked_fill(~candidates, torch.inf).argmin(2, keepdim=True)
    return torch.zeros_like(candidates).scatter(2, place, True) & candidates
