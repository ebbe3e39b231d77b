"""Attention without its bias for place and padding: weights on any attention score.

Source: "Attention debiasing for token pruning in vision-language models" (arXiv 2508.17807), sections 3.2 and 3.3.
Its two parts are a weight that falls over raster order, and the suppression of patches that show padding. Where a
picture was padded is read from its pixels (:func:`picture_share`), so that batches need not carry sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.program.segments import numbers
from vlm.models.program.signals import Given, Signal


class PositionFit(NamedTuple):
    """Mean attention over raster order as ``scale * exp(sigma * x)``, x from 0 (first token) to 1 (last)."""

    scale: float
    sigma: float


@dataclass(frozen=True)
class Debias:
    """Takes the bias for late places and for padding out of an attention score.

    In a recipe a number, the ``sigma`` of ``exp(-sigma x)``, or ``fastv``, the weight of the authors' FastV code
    (``sigma`` None); or ``{sigma: 1.5, padding: 0.5}`` with one of them or both. sigma belongs to a model and a score:
    fit it on training data (:func:`fit_position`). The paper's values for LLaVA-1.5-7B are fitted on each benchmark:
    1.45 to 2.38 for PyramidDrop, 1.32 to 2.67 for SparseVLM.

    padding: a patch of which less than this share shows the picture ranks below all that do (0.5 for FastV and
    SparseVLM in the authors' code, 0.01 for PyramidDrop). Such patches stay only where the budget is larger than the
    picture; the code of FastV lowers the budget instead. Where none shows so much, none counts as padding. In composed
    models, which pad pictures themselves.

    In a vision encoder x is a patch's place in its view, and a view's attention has a sigma of its own (the paper fits
    attention in the language model only).
    """

    sigma: float | None
    padding: float | None = None

    @classmethod
    def parse(cls, value: Any) -> "Debias":
        """Read a recipe value. Raises ValueError for anything but a number of 0 or more, ``fastv``, or a table of
        these."""
        if isinstance(value, Debias):
            return value
        if isinstance(value, Mapping):
            return cls._of_table(value)
        try:
            sigma = None if value == "fastv" else float(value)
        except (TypeError, ValueError):
            sigma = -1.0
        if sigma is not None and not 0 <= sigma < float("inf"):
            raise ValueError(f"expected the sigma of exp(-sigma x), 0 or more, or fastv; found {value!r}")
        return cls(sigma)

    @classmethod
    def _of_table(cls, value: Mapping[str, Any]) -> "Debias":
        if not value or value.keys() - {"sigma", "padding"}:
            raise ValueError(f"expected sigma, padding or both; found {', '.join(map(str, value)) or 'nothing'}")
        sigma, padding = cls.parse(value.get("sigma", 0)).sigma, None
        if "padding" in value:
            try:
                padding = float(value["padding"])
            except (TypeError, ValueError):
                padding = 0.0
            if not 0 < padding <= 1:
                found = value["padding"]
                raise ValueError(f"padding: expected the share of a patch, above 0 and at most 1; found {found!r}")
        return cls(sigma, padding)

    def __str__(self) -> str:
        weight = "fastv" if self.sigma is None else f"{self.sigma:g}"
        return weight if self.padding is None else f"sigma {weight} padding {self.padding:g}"

    def __call__(
        self,
        score: Float[Tensor, "segments tokens"],
        valid: Bool[Tensor, "segments tokens"],
        share: Float[Tensor, "segments tokens"] | None = None,
        picture: Float[Tensor, "segments tokens"] | None = None,
    ) -> Float[Tensor, "segments tokens"]:
        """The scores, which are 0 or more, reweighted; ``share`` is each token's place in raster order, by default
        among those there. picture: how much of each token's patch shows the picture; -1 is the score of padding."""
        weight = cubic_weight(valid, share) if self.sigma is None else exponential_weight(valid, self.sigma, share)
        score = (score * weight).masked_fill(~valid, 0)
        if self.padding is None or picture is None:
            return score
        hidden = valid & (picture < self.padding - 1e-6)
        return score.masked_fill(hidden & (valid & ~hidden).any(1, keepdim=True), -1)


def _shown(model: Any, inputs: Any, weights: Tensor | None) -> Float[Tensor, "batch visual"]:
    return model.picture_share(inputs)


@dataclass(frozen=True)
class TokenShown(Given):
    """How much of each visual token's patch shows the picture, [batch, keys]."""


SHOWN = TokenShown(scores=_shown)


@dataclass(frozen=True)
class PatchPlace(Signal):
    """Place of each patch in its view before any cut in the encoder: 0 for the first, 1 for the last,
    [views, patches]."""

    layer: int = 0
    part: ClassVar[Literal["language", "vision"]] = "vision"
    of_inputs: ClassVar[bool] = True


@dataclass(frozen=True)
class PatchShown(Signal):
    """How much of each patch shows the picture and not what its view was padded with, [views, patches]."""

    layer: int = 0
    part: ClassVar[Literal["language", "vision"]] = "vision"
    of_inputs: ClassVar[bool] = True


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


def picture_share(
    images: Float[Tensor, "views 3 height width"],
    mean: Sequence[float],
    std: Sequence[float],
    grid: tuple[int, int],
) -> Float[Tensor, "views tokens"]:
    """How much of each patch shows the picture: the rest lies in the border, on any side, that has the mean colour and
    no other, with which ``resize: pad`` fills up. A view of that colour alone is all picture.

    images: normalised with mean and std. grid: rows and columns of the patches.
    """
    centre, spread = (images.new_tensor(list(values))[:, None, None] for values in (mean, std))
    off = images * spread + centre - (centre * 255).round() / 255  # 0 where the picture has that level, of 255
    empty = (off.abs() < 0.5 / 255).all(1)  # [V,H,W]

    def cover(line: Bool[Tensor, "views side"], patches: int) -> Float[Tensor, "views patches"]:
        seen = (line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0)  # from the first to the last that shows some
        seen = seen | ~line.any(1, keepdim=True)
        return torch.nn.functional.adaptive_avg_pool1d(seen.to(images.dtype)[:, None], patches)[:, 0]

    rows, cols = cover(~empty.all(2), grid[0]), cover(~empty.all(1), grid[1])
    return (rows[:, :, None] * cols[:, None]).flatten(1)


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
