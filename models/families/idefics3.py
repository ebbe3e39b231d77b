"""Idefics3 and SmolVLM: tiles of one size with text tokens between them, the whole image last."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vlm.models.family import Family, Picture, raster


class Idefics3(Family):
    """Idefics3 and SmolVLM: pixel shuffle and one linear map.

    A batch does not say which tiles belong together, so every tile is an image of its own in the layout.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    places: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision": ("model.vision_model",),
        "connector": ("model.connector",),
        "language": ("model.text_model", "lm_head"),
    }

    def whole_image(self, images: Sequence[int]) -> int:
        return images[-1]  # of a sample with one image; tiles of several cannot be told apart

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels = media["pixel_values"]  # [B,tiles,3,H,W], rows filled with tiles of zeros
        found = self.model.model.get_image_features(pixels, media.get("pixel_attention_mask"), return_dict=True)
        tokens = self.model.model.image_seq_len
        tiles = torch.cat(list(found.pooler_output)).split(tokens)
        real = pixels.flatten(0, 1)
        real = real[real.flatten(1).any(1)]
        return [raster(tile, int(tokens**0.5), image) for tile, image in zip(tiles, real, strict=True)]

    def blank(self) -> dict[str, Tensor]:
        side = self.config.vision_config.image_size
        return {"pixel_values": torch.ones(1, 1, 3, side, side)}
