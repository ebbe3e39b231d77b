"""From signals to one score per visual token, larger is kept. Pure functions without gradient of their own.

Shapes: [segments, tokens] with ``valid``; scores of padding are 0 and no statistic looks at it.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.segments import cosine, members, rows_at, unit


def shares(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"]
) -> Float[Tensor, "segments tokens"]:
    """Scores divided by their sum over the segment."""
    score = score.masked_fill(~valid, 0)
    return score / score.sum(1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


def unit_range(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"], floor: float = 0.0
) -> Float[Tensor, "segments tokens"]:
    """``(score - min + floor) / (max - min)`` over the segment; all ones where the scores are all equal."""
    low = score.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = score.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    scaled = torch.where(high > low, (score - low + floor) / (high - low), torch.ones_like(score))
    return scaled.masked_fill(~valid, 0)


def standardised(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"], epsilon: float = 1e-8
) -> Float[Tensor, "segments tokens"]:
    """Scores less their mean over the segment, divided by their unbiased deviation plus ``epsilon``."""
    n = valid.sum(1, keepdim=True)
    off = (score - (score.masked_fill(~valid, 0).sum(1, keepdim=True) / n.clamp_min(1))).masked_fill(~valid, 0)
    return off / ((off.square().sum(1, keepdim=True) / (n - 1).clamp_min(1)).sqrt() + epsilon)


def entropy_share(
    attention: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"]
) -> Float[Tensor, " segments"]:
    """Entropy of the attention over a segment's tokens as a share of the largest possible, in [0, 1].

    1 is uniform attention; a segment of one token has 1. Source: FlowCut (NeurIPS 2025), section 3.3.
    """
    entropy = torch.special.entr(shares(attention, valid)).sum(1)
    n = valid.sum(1)
    return torch.where(n > 1, entropy / n.clamp_min(2).log(), torch.ones_like(entropy))


def value_similarity(
    class_value: Float[Tensor, "segments heads dim"],
    value: Float[Tensor, "segments heads tokens dim"],
    valid: Bool[Tensor, "segments tokens"],
) -> Float[Tensor, "segments tokens"]:
    """How alike the values of the class token and of each token are: softmax of their products, mean over heads.

    The softmax runs over the class token too and the products are not scaled, as FlowCut's code has it (its paper
    says cosine). Source: FlowCut (NeurIPS 2025), section 3.2 and official code.
    """
    product = (value.float() @ class_value.float()[..., None])[..., 0]  # [S,H,T]
    itself = class_value.float().square().sum(-1, keepdim=True)  # [S,H,1]
    every = torch.cat([itself, product.masked_fill(~valid[:, None], -torch.inf)], -1)
    return every.softmax(-1)[..., 1:].mean(1)


def value_strength(value: Float[Tensor, "segments heads tokens dim"]) -> Float[Tensor, "segments tokens"]:
    """L1 norm of the mean over heads of the values. Source: FlowCut (NeurIPS 2025), section 3.2."""
    return value.float().mean(1).abs().sum(-1)


def first_row(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float | None = None,
    key_valid: Bool[Tensor, "batch keys"] | None = None,
    **_: Any,
) -> Float[Tensor, "batch heads keys"]:
    """Attention of the first row in a call that is not causal. It is what pruners in encoders ask for most, and one
    product: less than it takes to set up :func:`~vlm.kernels.received.received_attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q[:, :, :1].to(wide).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B,KV,heads of the group,D]
    score = (grouped @ k.to(wide).transpose(2, 3)).flatten(1, 2) * (scale or q.shape[3] ** -0.5)
    return (score if key_valid is None else score.masked_fill(~key_valid[:, None], -torch.inf)).softmax(-1)


def visible_shares(
    row: Float[Tensor, "batch heads asks dim"],
    key: Float[Tensor, "batch heads keys dim"],
    scale: float,
    visible: Bool[Tensor, "batch asks keys"],
) -> Float[Tensor, "batch asks keys"]:
    """Softmax over the visible keys of the scaled products, mean over heads; 0 in a row that sees none."""
    wide = torch.promote_types(row.dtype, torch.float32)
    product = row.to(wide) @ key.to(wide).transpose(2, 3) * scale
    return product.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1).masked_fill(~visible, 0)


def flow(
    attention: Float[Tensor, "segments tokens"],
    similarity: Float[Tensor, "segments tokens"],
    strength: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
) -> Float[Tensor, "segments tokens"]:
    """FlowCut's score of one layer: (attention + similarity, each as shares) times the strength of the value.

    Source: FlowCut (NeurIPS 2025), section 3.2; equal to the official code on its numbers.
    """
    return (shares(attention, valid) + shares(similarity, valid)) * strength.masked_fill(~valid, 0)


def smoothed(
    before: Float[Tensor, "segments tokens"] | None, score: Float[Tensor, "segments tokens"], share: float = 0.5
) -> Float[Tensor, "segments tokens"]:
    """Running mean over layers: ``share`` of this layer's score, the rest from ``before`` (None: first layer)."""
    return score if before is None else (1 - share) * before + share * score


def effective_rank(
    x: Float[Tensor, "segments tokens width"], valid: Bool[Tensor, "segments tokens"], *, centre: bool = False
) -> Float[Tensor, " segments"]:
    """exp of the entropy of a segment's singular values as shares: how many directions its tokens span.

    centre: subtract the mean token first (third-party codes do, the paper's page does not say so).
    Source: AgilePruner (ICLR 2026), project page; no code is published.
    """
    x = x.double().masked_fill(~valid[..., None], 0)
    if centre:
        mean = x.sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp_min(1)
        x = (x - mean).masked_fill(~valid[..., None], 0)
    gram = x.mT @ x if x.shape[1] >= x.shape[2] else x @ x.mT  # the smaller one has the same values, squared
    square = torch.linalg.eigvalsh(gram).clamp_min(0)
    rounding = torch.finfo(square.dtype).eps * max(x.shape[1:]) * square.amax(1, keepdim=True)
    values = square.masked_fill(square <= rounding, 0).sqrt()  # zeros add no entropy
    share = values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum(1).exp().float()


def key_strength(key: Float[Tensor, "segments heads tokens dim"]) -> Float[Tensor, "segments tokens"]:
    """L1 norm of each token's keys, all heads together. Source: DART (EMNLP 2025), pivot tokens."""
    return key.float().abs().sum((1, 3))


def text_raters(
    visual: Float[Tensor, "segments tokens width"],
    text: Float[Tensor, "segments words width"],
    valid: Bool[Tensor, "segments tokens"],
    text_valid: Bool[Tensor, "segments words"],
) -> Bool[Tensor, "segments words"]:
    """Words that the visual tokens look at more than at the average word, judged once on the input embeddings.

    Softmax over words of the unscaled products, mean over visual tokens, compared with the mean over words.
    Source: SparseVLM (ICML 2025), section 3.2 and official code.
    """
    product = visual.float() @ text.float().transpose(1, 2)  # [S,P,T]
    share = product.masked_fill(~text_valid[:, None], torch.finfo(product.dtype).min).softmax(-1)
    relevance = share.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
    relevance = relevance.masked_fill(~text_valid, 0)
    return (relevance > relevance.sum(1, keepdim=True) / text_valid.sum(1, keepdim=True).clamp_min(1)) & text_valid


def rated(
    attention: Float[Tensor, "segments heads words tokens"],
    raters: Bool[Tensor, "segments words"],
    heads: int | None = None,
) -> Float[Tensor, "segments tokens"]:
    """Attention that visual tokens get from the rater words, mean over raters and heads.

    heads: mean over this many heads only, those with the largest mass from raters to visual tokens (14 in
    SparseVLM+; the paper's first version takes all). Source: SparseVLM (ICML 2025), section 3.3 and official code.
    """
    weight = raters.to(attention.dtype) / raters.sum(1, keepdim=True).clamp_min(1)
    by_head = torch.einsum("shwt,sw->sht", attention, weight)
    if heads is None or heads >= by_head.shape[1]:
        return by_head.mean(1)
    strongest = by_head.sum(2).argsort(dim=1, descending=True, stable=True)[:, :heads]
    return by_head.gather(1, strongest[..., None].expand(-1, -1, by_head.shape[2])).mean(1)


def rotary_decay(
    distance: Int[Tensor, "*batch"],
    dim: int,
    base: float = 10_000.0,
    floor: float = 1e-3,
    theta: Float[Tensor, " half"] | None = None,
) -> Float[Tensor, "*batch"]:
    """What rotary positions alone make of equal vectors ``distance`` apart: ``2 / sqrt(dim) * sum_i cos(theta_i d)``.

    SparseVLM+ divides attention by it. It can come near zero or below for far tokens: clamped to ``floor`` here
    (the official code does not). theta: the frequencies, ``base ** (-2 i / dim)`` if not given.
    Source: SparseVLM official code, second version.
    """
    if theta is None:
        theta = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=distance.device) / dim)
    each = torch.arange(int(distance.max()) + 1 if distance.numel() else 0, device=distance.device)
    decay = (2 / dim**0.5 * (each[:, None] * theta).cos().sum(-1)).clamp_min(floor).float()
    return decay[distance.long()]  # many pairs are as far apart


def text_relevance(
    image: Float[Tensor, "segments tokens width"],
    text: Float[Tensor, "segments texts width"],
    valid: Bool[Tensor, "segments tokens"],
    text_valid: Bool[Tensor, "segments texts"],
) -> Float[Tensor, "segments tokens"]:
    """Relevance of patches to the question from CLIP embeddings, in (0, 1]: minus the mean cosine, rescaled.

    The sign is the paper's: CLIP's patches are inverted. Minimum and maximum are the segment's own (the official
    code takes them over the batch). Source: CDPruner (NeurIPS 2025), section 3.2 and official code.
    """
    return unit_range(-text_likeness(image, text, text_valid), valid, floor=1e-6)


def text_likeness(
    image: Float[Tensor, "segments tokens width"],
    text: Float[Tensor, "segments texts width"],
    text_valid: Bool[Tensor, "segments texts"],
) -> Float[Tensor, "segments tokens"]:
    """Mean cosine of each patch with the texts of its segment."""
    every = cosine(image, text).masked_fill(~text_valid[:, None], 0)
    return every.sum(2) / text_valid.sum(1, keepdim=True).clamp_min(1)


def language_relevance(
    visual: Float[Tensor, "segments tokens width"],
    words: Float[Tensor, "segments words width"],
    valid: Bool[Tensor, "segments tokens"],
    word_valid: Bool[Tensor, "segments words"],
) -> Float[Tensor, "segments tokens"]:
    """Relevance of visual tokens to the question inside the language model's own space, in (0, 1]: the mean cosine with
    its words' embeddings, rescaled as in :func:`text_relevance`. Ours, for where CLIP's text tower is not there."""
    every = cosine(visual, words).masked_fill(~word_valid[:, None], 0)
    return unit_range(every.sum(2) / word_valid.sum(1, keepdim=True).clamp_min(1), valid, floor=1e-6)


def relevance_kernel(
    x: Float[Tensor, "segments tokens width"], relevance: Float[Tensor, "segments tokens"]
) -> Float[Tensor, "segments tokens tokens"]:
    """Kernel of a determinantal point process: cosine similarity weighted by relevance on both sides.

    Source: CDPruner (NeurIPS 2025), section 3.3.
    """
    scaled = relevance[..., None] * unit(x)
    return scaled @ scaled.transpose(1, 2)


def holistic(
    x: Float[Tensor, "segments tokens width"],
    attention: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    chunk: Int[Tensor, "segments tokens"],
    weight: float = 0.09,
) -> Float[Tensor, "segments tokens"]:
    """HoloV's score: 1000 times attention, plus the variance of a token's cosine to the others of its chunk.

    The variance is scaled to the mean of the attention in the chunk and weighs ``weight``; its mean is over the
    other tokens, its sum also counts the token's own zero, as in the code. Source: HoloV (NeurIPS 2025), section 3.
    """
    index, there = members(chunk, valid)  # [S,C,M]: each chunk on its own, none with the tokens of another
    flat = index.flatten(1)
    unitary = unit(rows_at(x, flat).unflatten(1, index.shape[1:]))  # [S,C,M,W]
    pair = there[..., None] & there[..., None, :]
    itself = torch.eye(index.shape[2], dtype=torch.bool, device=x.device)
    similarity = (unitary @ unitary.transpose(2, 3)).masked_fill(~pair | itself, 0)
    size = there.sum(2, keepdim=True)  # [S,C,1]
    others = (size - 1).clamp_min(1)
    mean = similarity.sum(3) / others
    variance = (similarity - mean[..., None]).masked_fill(~pair, 0).square().sum(3) / others  # [S,C,M]
    own = 1000 * attention.float().gather(1, flat).view(index.shape).masked_fill(~there, 0)
    level, spread = (value.abs().sum(2, keepdim=True) / size.clamp_min(1) for value in (own, variance))
    score = (own + weight * variance * level / (spread + 1e-6)).masked_fill(~there, 0)
    return torch.zeros_like(attention, dtype=score.dtype).scatter_add(1, flat, score.flatten(1))


def mean_of_groups(
    score: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    size: int,
    how: Literal["mean", "max"] = "mean",
) -> Float[Tensor, "segments groups"]:
    """One score per ``size`` tokens in a row, such as the four patches that Qwen's merger makes one token of.

    Raises ValueError unless tokens come in whole groups.
    """
    if score.shape[1] % size:
        raise ValueError(f"score: expected groups of {size} tokens; found {score.shape[1]} tokens")
    groups, there = score.unflatten(1, (-1, size)), valid.unflatten(1, (-1, size))
    if how == "max":
        return groups.masked_fill(~there, -torch.inf).amax(2).masked_fill(~there.any(2), 0)
    return groups.masked_fill(~there, 0).sum(2) / there.sum(2).clamp_min(1)
