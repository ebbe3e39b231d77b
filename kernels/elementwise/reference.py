"""The definition of elementwise attention in plain PyTorch: any float type, any device, differentiable."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from vlm.kernels.row_chunks import in_row_chunks
from vlm.kernels.visibility import Operands

MOST_EXPONENT = 5.0  # of fn="exp"


class Weighing(NamedTuple):
    """What elementwise attention knows beyond attention: the function of the scores and what is added to them."""

    fn: str
    bias: Float[Tensor, "batch heads rows"]
    by_count: bool  # whether a row is divided by the number of keys it sees

    def normalised(
        self, x: Operands, out: Float[Tensor, "batch heads some value_dim"], rows: slice
    ) -> Float[Tensor, "batch heads some value_dim"]:
        if not self.by_count:
            return out
        return out / x.seen.count()[:, None, rows, None].clamp_min(1).to(out.dtype)


def elementwise_reference(x: Operands, how: Weighing) -> Tensor:
    return _some_rows(x, how, slice(None))[0]


def elementwise_torch(x: Operands, how: Weighing) -> Tensor:
    """The reference a few rows at a time, recomputed in the backward: chunk x keys of memory, never rows x keys."""
    return in_row_chunks(lambda rows: _some_rows(x, how, rows), x.q.shape[2])[0]


def _some_rows(x: Operands, how: Weighing, rows: slice) -> tuple[Tensor]:
    assert x.v is not None
    scores = x.scores(rows) + how.bias[:, :, rows, None]  # [B,H,Q,K], -inf where hidden: each function gives 0 there
    if how.fn == "sigmoid":
        weights = scores.sigmoid()
    elif how.fn == "exp":
        weights = scores.clamp_max(MOST_EXPONENT).exp()
    else:
        weights = scores.relu()
    out = weights.to(x.v.dtype) @ x.per_head(x.v)
    return (how.normalised(x, out, rows),)
