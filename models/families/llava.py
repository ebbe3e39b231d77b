"""LLaVA-1.5: a fixed grid of tokens for every image."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from vlm.models.family import Family, Picture, raster


class Llava(Family):
    """Visual Instruction Tuning and Improved Baselines with Visual Instruction Tuning: CLIP patches through an MLP."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels = media["pixel_values"]  # [N,3,H,W]
        found = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        columns = pixels.shape[3] // self.config.vision_config.patch_size
        return [raster(features, columns, image) for features, image in zip(found, pixels, strict=True)]
