"""LLaVA-NeXT: the whole image, then its tiles without their padding, each row of the tiles ended by a newline token."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm.models.family import Family, Picture


class LlavaNext(Family):
    """LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (any resolution).

    The rows of the tiles' grid stand below those of the whole image.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    also: ClassVar[tuple[str, ...]] = ()  # media besides pixels and sizes that say how images are packed

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels, sizes = media["pixel_values"], media["image_sizes"]  # [N,P,3,H,W], [N,2]
        more: dict[str, Any] = {name: media[name] for name in self.also if name in media}
        found = self.model.model.get_image_features(pixels, sizes, return_dict=True, **more).pooler_output
        vision = self.config.vision_config
        side, newline = vision.image_size // vision.patch_size, self.model.model.image_newline
        return [_stacked(features, side, newline, tiles) for features, tiles in zip(found, pixels, strict=True)]

    def blank(self) -> dict[str, Tensor]:
        side = self.config.vision_config.image_size
        tiles = {"pixel_values": torch.zeros(1, 32, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
        return tiles | {"batch_num_images": torch.tensor([2])}


def _stacked(features: Tensor, side: int, newline: Tensor, pixels: Tensor) -> Picture:
    """A grid of side x side tokens, below it rows of tokens that newlines end."""
    ends = (features[side**2 :] == newline.to(features)).all(1).long()
    row = ends.cumsum(0) - ends
    place = torch.arange(len(ends), device=features.device)
    starts = torch.zeros_like(row).scatter_reduce(0, row, place, "amin", include_self=False)
    base = torch.arange(side**2, device=features.device)
    col = place - starts[row]
    return Picture(features, torch.cat([base // side, side + row]), torch.cat([base % side, col]), pixels)
