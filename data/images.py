"""From an RGB picture to the tensor an encoder takes."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from vlm.data.errors import DataError

Resize = Literal["stretch", "pad", "crop"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageTransform:
    """Resize to `size` (height, width) and normalise with `mean` and `std` per channel, of values in [0, 1].

    * "stretch" ignores the aspect ratio;
    * "pad" fits the picture in and fills the rest with the mean colour, centred (LLaVA-1.5's expand to square);
    * "crop" fills the frame and cuts what stands out, centred (CLIP).

    A picture that has the size already is not resampled.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Resize = "stretch"
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        for name, kinds in (("resize", Resize), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kinds):
                raise DataError(f"{name}: expected one of {', '.join(get_args(kinds))}, found {getattr(self, name)!r}")
        if min(self.size) < 1 or min(self.std) <= 0:
            raise DataError(f"image transform: expected a size and std above 0, found {self.size} and {self.std}")

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """float32 pixels of an RGB picture, normalised."""
        pixels = torch.from_numpy(np.array(self.fit(image), np.uint8)).permute(2, 0, 1).float().div_(255)
        return pixels.sub_(_channels(self.mean)).div_(_channels(self.std)).contiguous()

    def fit(self, image: Image.Image) -> Image.Image:
        """The resized picture, as the encoder will see it."""
        frame = (self.size[1], self.size[0])
        if image.size == frame:
            return image
        sampling = _FILTERS[self.interpolation]
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


@cache
def _channels(values: tuple[float, float, float]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values).view(3, 1, 1)
