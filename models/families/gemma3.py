"""Gemma 3: a fixed grid of tokens; the tokens of an image see each other in both directions."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.family import Family, Picture, raster
from vlm.models.program.layout import Layout


class Gemma3(Family):
    """Gemma 3 Technical Report, section 2: pooled SigLIP features, image tokens with bidirectional attention.

    A pan-and-scan crop is an image of its own in the layout.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    @property
    def visual_tokens(self) -> int:
        return self.config.mm_tokens_per_image

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels = media["pixel_values"]  # [N,3,H,W]
        found = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [
            raster(features, int(len(features) ** 0.5), image) for features, image in zip(found, pixels, strict=True)
        ]

    def block(
        self, visual: Bool[Tensor, "batch length"], types: Int[Tensor, "batch length"] | None
    ) -> Int[Tensor, "batch length"] | None:
        if types is None:
            return None
        image = types == 1
        starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
        return torch.where(image, starts.long().cumsum(1) - 1, -1)

    def mask_types(self, layout: Layout) -> Int[Tensor, "batch length"]:
        assert layout.block is not None
        return layout.block.ge(0).long()
