"""The definition of dense attention in plain PyTorch: any float type, any device, differentiable."""

from torch import Tensor

from vlm.kernels.row_chunks import in_row_chunks, softmax
from vlm.kernels.visibility import Operands


def dense_reference(x: Operands, with_lse: bool) -> tuple[Tensor, Tensor]:
    return _some_rows(x, slice(None))


def dense_torch(x: Operands, with_lse: bool) -> tuple[Tensor, ...]:
    """The reference a few rows at a time, recomputed in the backward: chunk x keys of memory, never rows x keys."""
    return in_row_chunks(lambda rows: _some_rows(x, rows), x.q.shape[2])


def _some_rows(x: Operands, rows: slice) -> tuple[Tensor, Tensor]:
    assert x.v is not None
    weights, lse = softmax(x.scores(rows))  # [B,H,Q,K], [B,H,Q]
    return weights.to(x.v.dtype) @ x.per_head(x.v), lse
