"""How a number of tokens is divided: among chunks of a picture, crops of a picture, layers or heads."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.segments import numbers


def divide(total: int, weight: Sequence[float], limit: Sequence[int]) -> list[int]:
    """``total`` in whole parts by ``weight``, none above its ``limit``; all of it, unless the limits hold less.

    Each part is rounded down and the rest goes, one each, to the largest weights (the earlier of a tie). What a full
    part cannot take is divided again among the others (the published codes lose it); those without weight come last.
    """
    part = [0] * len(limit)
    left = min(total, sum(limit))
    while left > 0:
        room = {i: limit[i] - part[i] for i in range(len(part)) if limit[i] > part[i]}
        share = {i: float(weight[i]) for i in room if weight[i] > 0} or dict.fromkeys(room, 1.0)
        whole = sum(share.values())
        wanted = {i: int(left * share[i] / whole) for i in share}
        if all(wanted[i] <= room[i] for i in share):
            rest = left - sum(wanted.values())
            for i in sorted(share, key=lambda i: -share[i])[:rest]:
                wanted[i] += 1
        for i in share:
            part[i] += min(wanted[i], room[i])
        left = min(total, sum(limit)) - sum(part)
    return part


def quotas(
    total: Int[Tensor, " segments"],
    weight: Float[Tensor, "segments groups"],
    limit: Int[Tensor, "segments groups"],
) -> Int[Tensor, "segments groups"]:
    """:func:`divide` for each segment."""
    rows = zip(total.tolist(), weight.tolist(), limit.tolist(), strict=True)
    return limit.new_tensor([divide(*row) for row in rows]).reshape(limit.shape)


def chunks_of(valid: Bool[Tensor, "segments tokens"], chunks: int) -> Int[Tensor, "segments tokens"]:
    """Chunk of each token when a segment's tokens are cut into ``chunks`` runs, the first ones longer by one.

    Source: HoloV (NeurIPS 2025), section 3; official code.
    """
    n, number = valid.sum(1, keepdim=True), numbers(valid)
    short, longer = n // chunks, n % chunks
    head = (short + 1) * longer  # tokens in the chunks that are longer by one
    chunk = torch.where(number < head, number // (short + 1), longer + (number - head) // short.clamp_min(1))
    return chunk.clamp(0, chunks - 1)


def group_sums(
    value: Float[Tensor, "segments tokens"],
    group: Int[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    groups: int,
) -> Float[Tensor, "segments groups"]:
    """Sum of the values of each group of tokens."""
    empty = value.new_zeros(len(value), groups)
    return empty.scatter_add(1, group.clamp(0, groups - 1), value.masked_fill(~valid, 0))


def chunk_quotas(
    score: Float[Tensor, "segments tokens"],
    chunk: Int[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    count: Int[Tensor, " segments"],
    chunks: int,
) -> Int[Tensor, "segments chunks"]:
    """Tokens to keep in each chunk, by the mean score of its tokens.

    Source: HoloV (NeurIPS 2025), section 3; the code pads with zeros where a chunk is smaller than its quota.
    """
    size = group_sums(torch.ones_like(score), chunk, valid, chunks)
    mean = group_sums(score, chunk, valid, chunks) / size.clamp_min(1)
    return quotas(count, mean, size.long())


def crop_quotas(
    early_attention: Float[Tensor, " tokens"],
    total: int,
    rows: int,
    columns: int,
    whole_share: float = 0.5,
    divide_by: Literal["chunks", "cells"] = "chunks",
) -> list[int]:
    """Tokens to keep of the whole picture and of each of its ``rows * columns`` crops, all of equal size.

    early_attention: class-token attention of the whole picture in the first encoder layer; its largest
        ``1 - whole_share`` of tokens vote for the crop that they lie in. Padding, below 0, has no vote.
    divide_by: ``"chunks"``, the crops' votes are runs of the flat token list, as in the code; ``"cells"``, they are
        the cells of the picture that the crops show (square pictures only).

    Quotas are rounded down, so the sum can be a few below ``total``. Source: HiRED (AAAI 2025), section 3.2.
    """
    n, crops = len(early_attention), rows * columns
    whole = min(int(total * whole_share), n)
    rest = min(total - whole, crops * n)
    voters = early_attention.argsort(descending=True, stable=True)[: int(n * (1 - whole_share))]
    votes = torch.zeros(n).scatter(0, voters.cpu(), (early_attention[voters] >= 0).float().cpu())
    if divide_by == "chunks":
        weight = votes.reshape(crops, -1).sum(1)
    else:
        side = round(n**0.5)
        weight = votes.reshape(rows, side // rows, columns, side // columns).sum((1, 3)).flatten()
    weight = weight / weight.sum()
    return [whole, *(min(int(w * rest), n) for w in weight)]
