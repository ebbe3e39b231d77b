"""A few rows at a time: how an operation in plain PyTorch keeps to chunk x keys of memory, never rows x keys."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 128


def in_row_chunks(some_rows: Callable[[slice], tuple[Tensor, ...]], rows: int) -> tuple[Tensor, ...]:
    """What ``some_rows`` gives for one slice of rows after the other, put together along dimension 2.

    The backward computes each chunk again instead of keeping what it was computed from.
    """
    if rows <= ROWS and not torch.is_grad_enabled():
        return some_rows(slice(None))  # nothing to cut up or to keep: a decoding step is spared the bookkeeping
    starts = range(0, max(rows, 1), ROWS)
    parts = [
        checkpoint(some_rows, slice(start, start + ROWS), use_reentrant=False, preserve_rng_state=False)
        for start in starts
    ]
    return tuple(torch.cat(each, 2) for each in zip(*parts, strict=True))


def softmax(
    scores: Float[Tensor, "batch heads rows keys"],
) -> tuple[Float[Tensor, "batch heads rows keys"], Float[Tensor, "batch heads rows"]]:
    """(weights, log-sum-exp) of scores that are -inf where a key is hidden; a row that sees nothing gets 0 and -inf."""
    lse = scores.logsumexp(-1)
    return torch.exp(scores - torch.where(lse.isneginf(), 0, lse)[..., None]), lse
