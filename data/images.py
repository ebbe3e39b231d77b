"""From an RGB picture to the tensor an encoder takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from vlm.data.errors import DataError

Resize = Literal["stretch", "pad", "crop"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Views(NamedTuple):
    """A picture as an encoder sees it: whole, then its tiles from left to right and top to bottom.

    `tiles` are the rows and columns of tiles and the picture's own height and width; None where pictures are not tiled.
    A picture that keeps its shape has no tiles, and the height and width of its pixels.
    """

    pixels: Float[Tensor, "views 3 height width"]
    tiles: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class ImageTransform:
    """Resize to `size` (height, width) and normalise with `mean` and `std` per channel, of values in [0, 1].

    * "stretch" ignores the aspect ratio;
    * "pad" fits the picture in and fills the rest with the mean colour, centred (LLaVA-1.5's expand to square);
    * "crop" fills the frame and cuts what stands out, centred (CLIP).

    A picture that has the size already is not resampled.

    `max_tiles` above 0 also cuts large pictures into so many tiles of `size` at most (LLaVA-NeXT, "any resolution"):
    the picture is fitted into a grid of tiles, the rest is filled with the mean colour, evenly on both sides. A
    picture that one tile shows as well gets none.

    `max_patches` above 0 keeps a picture's shape instead ("native resolution"): it gets the largest size whose sides
    are multiples of `patch` and that has so many patches at most; see :func:`patch_grid`. `size` and `resize` then say
    nothing.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = "stretch"
    interpolation: Interpolation = "bicubic"
    max_tiles: int = 0
    patch: int = 1
    max_patches: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("resize", Resize), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kinds):
                raise DataError(f"{name}: expected one of {', '.join(get_args(kinds))}, found {getattr(self, name)!r}")
        if min(self.size) < 1 or min(self.std) <= 0:
            raise DataError(f"image transform: expected a size and std above 0, found {self.size} and {self.std}")
        if self.max_tiles < 0:
            raise DataError(f"image transform: expected max_tiles of at least 0, found {self.max_tiles}")
        if self.max_patches and self.max_tiles:
            raise DataError("image transform: expected tiles or pictures that keep their shape, found both")

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """float32 pixels of an RGB picture, normalised."""
        return self._normalised(self.fit(image)).contiguous()

    def views(self, image: Image.Image) -> Views:
        """The whole picture, and its tiles where `max_tiles` is above 0."""
        whole = self(image)[None]
        if self.max_patches:
            return Views(whole, (0, 0, whole.shape[2], whole.shape[3]))
        if not self.max_tiles:
            return Views(whole)
        rows, columns = tile_grid(image.height, image.width, self.size, self.max_tiles)
        shape = (rows, columns, image.height, image.width)
        if rows * columns == 1:
            return Views(whole, (0, 0, *shape[2:]))
        height, width = self.size
        frame = (columns * width, rows * height)
        pixels = self._normalised(self._pad(image, frame, _FILTERS[self.interpolation]))
        tiles = pixels.unflatten(2, (columns, width)).unflatten(1, (rows, height))  # [3,rows,h,columns,w]
        return Views(torch.cat([whole, tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)]), shape)

    def _normalised(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        pixels = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).float().div_(255)
        return pixels.sub_(_channels(self.mean)).div_(_channels(self.std))

    def fit(self, image: Image.Image) -> Image.Image:
        """The resized picture, as the encoder will see it."""
        frame = (self.size[1], self.size[0])
        if self.max_patches:
            rows, columns = patch_grid(image.height, image.width, self.patch, self.max_patches)
            frame = (columns * self.patch, rows * self.patch)
        if image.size == frame:
            return image
        sampling = _FILTERS[self.interpolation]
        if self.max_patches:
            return image.resize(frame, sampling)
        if self.resize == "pad":
            return self._pad(image, frame, sampling)
        if self.resize == "crop":
            return ImageOps.fit(image, frame, method=sampling)
        return image.resize(frame, sampling)

    def _pad(self, image: Image.Image, frame: tuple[int, int], sampling: Image.Resampling) -> Image.Image:
        """Not PIL's own: that one rounds the short side of a thin picture to nothing."""
        scale = min(frame[0] / image.width, frame[1] / image.height)
        width, height = (max(1, round(side * scale)) for side in image.size)
        canvas = Image.new("RGB", frame, tuple(round(channel * 255) for channel in self.mean))
        canvas.paste(image.resize((width, height), sampling), ((frame[0] - width) // 2, (frame[1] - height) // 2))
        return canvas


def patch_grid(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture that keeps its shape: the most for one scale of both sides, rounded up.

    The scale is found by bisection between 1e-6 and 100, to 1e-5. Source: SigLIP 2 (arXiv 2502.14786), section 2.4.2,
    and the official image processor, whose steps these are, so that both give the same grid for every picture.
    """

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, ceil(side * scale / patch)) for side in (height, width))
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        rows, columns = grid(scale)
        low, high = (scale, high) if rows * columns <= max_patches else (low, scale)
    return grid(low)


def joined(views: Sequence[Tensor]) -> Float[Tensor, "all 3 height width"]:
    """Pixels [views, 3, height, width] one after the other; smaller ones get zeros on the right and
    below, up to the largest."""
    height, width = (max(pixels.shape[side] for pixels in views) for side in (2, 3))
    return torch.cat([F.pad(p, (0, width - p.shape[3], 0, height - p.shape[2])) for p in views])


def tile_grid(height: int, width: int, size: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the grid of at most `max_tiles` tiles of `size` that shows a picture best.

    Best is what keeps the most of the picture's pixels and, among those, wastes the fewest of the grid's: the fewest
    tiles. Source: LLaVA-NeXT (2024), its `select_best_resolution`, over all grids.
    """

    def kept(grid: tuple[int, int]) -> int:
        rows, columns = grid[0] * size[0], grid[1] * size[1]
        if rows * width <= columns * height:
            shown = rows * (width * rows // height)
        else:
            shown = columns * (height * columns // width)
        return min(shown, height * width)

    return max(_grids(max_tiles), key=kept)  # the first of the best, and those of fewer tiles come first


@cache
def _grids(max_tiles: int) -> list[tuple[int, int]]:
    """Every grid of at most so many tiles; those of fewer tiles first."""
    sides = range(1, max_tiles + 1)
    grids = [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


@cache
def _channels(values: tuple[float, float, float]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values).view(3, 1, 1)
