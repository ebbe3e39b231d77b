"""Several encoders as one, as in Prismatic and Eagle: ``vision: {use: fused, parts: [{timm: ...}, {timm: ...}]}``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.encoder import Encoder, Features, ImageSpec
from vlm.models.errors import ModelError
from vlm.models.part import Part


class Fused(Part):
    """Encoders side by side over one image; the features of a place are joined along the channels.

    Pixels come once, in the size of the largest encoder and without normalisation; each encoder sees them in its own
    size and normalised as it asks. Tokens before the patches are left out, whatever their number in each.

    Args:
        parts: the encoders, each as ``vision`` itself would name it.
        grid: rows and columns to which every encoder's features are resized (bilinear, corners to corners, as
            in Eagle); without it the encoders must have the same grid (as in Prismatic).
        score_from: number of the encoder, counted from 0, whose attention pruners see.
    """

    source: ClassVar[str] = "Prismatic VLMs (ICML 2024), section 4.2; resized grids: Eagle (arXiv 2408.15998)"
    verified: ClassVar[str] = "paper"

    def __init__(self, parts: Sequence[Encoder], grid: tuple[int, int] | None = None, score_from: int = 0) -> None:
        super().__init__()
        if not 0 <= score_from < len(parts):
            raise ModelError(f"model.vision: expected score_from 0..{len(parts) - 1}, a part; found {score_from}")
        found = [part.grid for part in parts]
        if grid is None and len(set(found)) > 1:
            shown = ", ".join(f"{rows} x {cols}" for rows, cols in found)
            raise ModelError(f"model.vision: expected parts with one grid; found {shown}; set grid to resize them")
        if grid is not None and min(grid) < 1:
            raise ModelError(f"model.vision: expected a grid of at least 1 x 1; found {grid[0]} x {grid[1]}")
        self.parts: Any = nn.ModuleList(parts)  # type: ignore[arg-type]
        self.grid: tuple[int, int] = found[0] if grid is None else (grid[0], grid[1])
        self.dim = sum(part.dim for part in parts)
        largest = max(parts, key=lambda part: part.image.size)
        self.image = largest.image._replace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.spatial = all(getattr(part, "spatial", True) for part in parts)
        self.cuts = "the tokens of several encoders must stay in step"
        self._scorer = score_from
        scorer: Encoder = self.parts[score_from]
        self.depth, self.output, self.prefix = scorer.depth, scorer.output, scorer.prefix
        self.class_token = scorer.class_token
        self.blind = "" if scorer.blocks else f"{type(scorer).__name__} has no attention blocks"
        if scorer.grid != self.grid:
            self.blind = f"part {score_from} has a grid of {scorer.grid}, resized to {self.grid}"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.parts[self._scorer].blocks

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        if images.shape[2:] != torch.Size([self.image.size] * 2):
            found = tuple(images.shape[2:])
            raise ModelError(f"model.vision: expected pixels of side {self.image.size}; found {found}")
        features = [self._aligned(part(pixels_for(part.image, images))) for part in self.parts]
        return Features(torch.cat(features, 2), self.grid)

    def _aligned(self, found: Features) -> Float[Tensor, "images tokens width"]:
        """The features of one encoder on the common grid."""
        if found.grid == self.grid:
            return found.tokens
        maps = found.tokens.transpose(1, 2).unflatten(2, found.grid)  # [N,V,h,w]
        maps = F.interpolate(maps, self.grid, mode="bilinear", align_corners=True)
        return maps.flatten(2).transpose(1, 2)


def pixels_for(spec: ImageSpec, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 side side"]:
    """Pixels in 0..1 as one encoder asks for them: its size, its mean, its standard deviation.

    A smaller size is reached with its own filter (bicubic for those that torch does not have), antialiased.
    """
    if images.shape[2] != spec.size:
        mode = spec.interpolation if spec.interpolation in ("bilinear", "bicubic") else "bicubic"
        images = F.interpolate(images, (spec.size, spec.size), mode=mode, antialias=True, align_corners=False)
        images = images.clamp(0, 1)  # a cubic filter overshoots
    mean, std = (images.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (images - mean) / std
