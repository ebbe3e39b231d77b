"""LLaVA-1.5: a fixed grid of tokens for every image."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from vlm.models.family import Family, Picture, after_features, plain_tower, raster
from vlm.models.tower import PLAIN, Tower, has_class_token


class Llava(Family):
    """Visual Instruction Tuning and Improved Baselines with Visual Instruction Tuning: CLIP patches through an MLP."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    @property
    def visual_tokens(self) -> int | None:
        vision = self.config.vision_config
        if vision.model_type not in PLAIN:
            return None
        dropped = int(self.config.vision_feature_select_strategy == "default")
        return (vision.image_size // vision.patch_size) ** 2 + has_class_token(vision) - dropped

    @property
    def tower(self) -> Tower | None:
        return plain_tower(self.model)

    @property
    def idle(self) -> Sequence[str]:
        return after_features(self.model)

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels = media["pixel_values"]  # [N,3,H,W]
        found = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        columns = pixels.shape[3] // self.config.vision_config.patch_size
        return [raster(features, columns, image) for features, image in zip(found, pixels, strict=True)]
