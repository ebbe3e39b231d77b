"""Operations on batched segments: [segments, tokens] tensors in which ``valid`` says what is there.

Whatever the catalogue does, it does to each segment as if it stood alone: padding and the other segments change
nothing. Ties go to the earlier token.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def descending(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"]
) -> Int[Tensor, "segments tokens"]:
    """Indices of the tokens of each segment from the largest score to the smallest, padding last."""
    order = score.argsort(dim=1, descending=True, stable=True)
    behind = (~valid).gather(1, order).int().argsort(dim=1, stable=True)  # a valid token may score -inf as well
    return order.gather(1, behind)


def ranks(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"]
) -> Int[Tensor, "segments tokens"]:
    """Rank of each token in its segment, 0 for the largest score; padding ranks after all valid tokens."""
    return descending(score, valid).argsort(dim=1)


def numbers(valid: Bool[Tensor, "segments tokens"]) -> Int[Tensor, "segments tokens"]:
    """Number of each token among the valid ones of its segment; meaningless for padding, never negative."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def marks(
    order: Int[Tensor, "segments picks"], valid: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]
) -> Bool[Tensor, "segments tokens"]:
    """Mark the first ``count[s]`` tokens of each row of ``order``, which may repeat tokens beyond that."""
    wanted = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return (torch.zeros_like(valid, dtype=torch.long).scatter_add(1, order, wanted.long()) > 0) & valid


def places(
    kept: Bool[Tensor, "segments tokens"],
) -> tuple[Int[Tensor, "segments kept"], Bool[Tensor, "segments kept"]]:
    """Indices of the marked tokens of each segment in order, padded on the right, and which of them are real."""
    longest = int(kept.sum(1).max()) if kept.numel() else 0
    order = (~kept).int().argsort(dim=1, stable=True)[:, :longest]
    return order, kept.gather(1, order)


def members(
    group: Int[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"]
) -> tuple[Int[Tensor, "segments groups most"], Bool[Tensor, "segments groups most"]]:
    """Indices of the valid tokens of each group in order, padded on the right, and which of them are real."""
    groups = int(group.max()) + 1 if group.numel() else 0
    own = group.masked_fill(~valid, groups)  # padding is a group of its own, the last
    order = own.argsort(dim=1, stable=True)
    own = own.gather(1, order)
    within = torch.arange(own.shape[1], device=own.device) - torch.searchsorted(own, own)
    size = torch.zeros(len(own), groups + 1, dtype=torch.long, device=own.device)
    size = size.scatter_add(1, own, torch.ones_like(own))[:, :groups]
    most = int(size.max()) if size.numel() else 0
    spare = groups * most
    index = torch.zeros(len(own), spare + 1, dtype=torch.long, device=own.device)
    index.scatter_(1, torch.where(own < groups, own * most + within, spare), order)
    return index[:, :spare].view(len(own), groups, most), torch.arange(most, device=own.device) < size[..., None]


def cosine(
    x: Float[Tensor, "segments tokens width"], y: Float[Tensor, "segments others width"]
) -> Float[Tensor, "segments tokens others"]:
    """Cosine similarity of each token of ``x`` with each of ``y``, at least in single precision."""
    with torch.autocast(x.device.type, enabled=False):  # which makes products in half precision of it
        return unit(x) @ unit(y).transpose(1, 2)


def unit(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Vectors of length one, at least in single precision; zero stays zero."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.nn.functional.normalize(wide, dim=-1)


def rows_at(
    x: Float[Tensor, "segments tokens width"], place: Int[Tensor, "segments picks"]
) -> Float[Tensor, "segments picks width"]:
    """The features of the tokens at ``place``."""
    segment = torch.arange(len(x), device=x.device)[:, None]
    return x[segment, place]  # whole rows at once: a gather looks up every number


def weighted_sums(
    weight: Float[Tensor, "segments sums tokens"],
    x: Float[Tensor, "segments tokens width"],
    valid: Bool[Tensor, "segments tokens"],
) -> Float[Tensor, "segments sums width"]:
    """Weighted sums of tokens. A product of matrices: unlike a scatter, it adds in the same order each time."""
    wide = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        return (weight.to(wide.dtype) @ wide.masked_fill(~valid[..., None], 0)).to(x.dtype)
