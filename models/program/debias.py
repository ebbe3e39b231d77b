"""Attention without its bias for place and padding: weights on any attention score.

Source: "Attention debiasing for token pruning in vision-language models" (arXiv 2508.17807), sections 3.2 and 3.3.
Of its two parts a recipe reaches the reweighting by position. The suppression of padding (:func:`without_padding`)
needs the size that a picture had before it was padded to a square, which no batch carries: it is a function here, not
an option.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.program.segments import numbers


class PositionFit(NamedTuple):
    """Mean attention over raster order as ``scale * exp(sigma * x)``, x from 0 (first token) to 1 (last)."""

    scale: float
    sigma: float


@dataclass(frozen=True)
class Debias:
    """Takes the bias for late places out of an attention score, by a weight that falls over raster order.

    In a recipe a number, the ``sigma`` of ``exp(-sigma x)``, or ``fastv``, the weight of the authors' FastV code
    (``sigma`` None). sigma belongs to a model and a score: fit it on training data (:func:`fit_position`). The paper's
    values for LLaVA-1.5-7B are fitted on each benchmark: 1.45 to 2.38 for PyramidDrop, 1.32 to 2.67 for SparseVLM.
    """

    sigma: float | None

    @classmethod
    def parse(cls, value: Any) -> "Debias":
        """Read a recipe value. Raises ValueError for anything but a number of 0 or more, or ``fastv``."""
        if isinstance(value, Debias):
            return value
        try:
            sigma = None if value == "fastv" else float(value)
        except (TypeError, ValueError):
            sigma = -1.0
        if sigma is not None and not 0 <= sigma < float("inf"):
            raise ValueError(f"expected the sigma of exp(-sigma x), 0 or more, or fastv; found {value!r}")
        return cls(sigma)

    def __str__(self) -> str:
        return "fastv" if self.sigma is None else f"{self.sigma:g}"

    def __call__(
        self,
        score: Float[Tensor, "segments tokens"],
        valid: Bool[Tensor, "segments tokens"],
        share: Float[Tensor, "segments tokens"] | None = None,
    ) -> Float[Tensor, "segments tokens"]:
        """The scores, reweighted; ``share`` is each token's place in raster order, by default among those there."""
        weight = cubic_weight(valid, share) if self.sigma is None else exponential_weight(valid, self.sigma, share)
        return (score * weight).masked_fill(~valid, 0)


def raster_share(valid: Bool[Tensor, "segments tokens"]) -> Float[Tensor, "segments tokens"]:
    """Place of each token in raster order: 0 for the first valid token of a segment, 1 for the last."""
    return numbers(valid) / (valid.sum(1, keepdim=True) - 1).clamp_min(1)


def exponential_weight(
    valid: Bool[Tensor, "segments tokens"],
    sigma: float | Float[Tensor, " segments"],
    share: Float[Tensor, "segments tokens"] | None = None,
) -> Float[Tensor, "segments tokens"]:
    """Weight ``exp(-sigma x)`` that takes an exponential rise of attention over raster order away (section 3.2).

    share: each token's place x, by default among those there.
    """
    x = raster_share(valid) if share is None else share
    slope = torch.as_tensor(sigma, dtype=torch.float32, device=valid.device).reshape(-1, 1)
    return torch.exp(-slope * x).masked_fill(~valid, 0)


def cubic_weight(
    valid: Bool[Tensor, "segments tokens"], share: Float[Tensor, "segments tokens"] | None = None
) -> Float[Tensor, "segments tokens"]:
    """The weight that the authors' code uses with FastV on LLaVA-1.5-7B: one over a cubic fit. share: as above."""
    x = raster_share(valid) if share is None else share
    return (1 / (((4.88412565 * x - 4.82643345) * x + 1.73373862) * x + 1)).masked_fill(~valid, 0)


def fit_position(mean_attention: Float[Tensor, " tokens"]) -> PositionFit:
    """Least squares of the log of mean attention over raster order. The authors' own fit is not published.

    Raises ValueError unless there are two tokens or more, all with positive attention.
    """
    n = len(mean_attention)
    if n < 2 or not bool((mean_attention > 0).all()):
        raise ValueError(f"mean_attention: expected two positive values or more; found {n}, some not positive")
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    y = mean_attention.double().cpu().log()
    sigma = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return PositionFit(float((y.mean() - sigma * x.mean()).exp()), float(sigma))


def without_padding(height: int, width: int, grid: int, least: float = 0.5) -> Bool[Tensor, "grid grid"]:
    """Which patches show the picture, when it was padded to a square around its middle.

    height, width: of the picture. least: the share of a patch that must be picture (section 3.3: 0.5 for FastV;
    PyramidDrop's code keeps a patch with at least 0.01).
    """
    longest = max(height, width)

    def cover(side: int) -> Tensor:  # share of each row (or column) of patches that is picture
        start = (longest - side) / 2 / longest * grid
        end = start + side / longest * grid
        edge = torch.arange(grid, dtype=torch.float64)
        return (torch.clamp(edge + 1, max=end) - torch.clamp(edge, min=start)).clamp_min(0)

    return cover(height)[:, None] * cover(width)[None, :] >= least - 1e-9
