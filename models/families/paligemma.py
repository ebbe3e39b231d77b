"""PaliGemma: a fixed grid of tokens, and a prompt that is read in both directions (prefix-LM)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.family import Family, Picture, raster
from vlm.models.program.layout import Layout


class PaliGemma(Family):
    """PaliGemma (Beyer et al., 2024, section 3.2) and PaliGemma 2: image and prefix see each other, the suffix is
    causal. Position ids start at 1."""

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    refuses: ClassVar[Mapping[str, str]] = {
        "Regroup": "a prompt that is read in both directions cannot be regrouped; rules on attention are causal"
    }
    first_position: ClassVar[int] = 1

    @property
    def visual_tokens(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels = media["pixel_values"]  # [N,3,H,W]
        found = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [
            raster(features, int(len(features) ** 0.5), image) for features, image in zip(found, pixels, strict=True)
        ]

    def block(
        self, visual: Bool[Tensor, "batch length"], types: Int[Tensor, "batch length"] | None
    ) -> Int[Tensor, "batch length"] | None:
        return None if types is None else torch.where(types == 0, 0, -1)

    def mask_types(self, layout: Layout) -> Int[Tensor, "batch length"]:
        assert layout.block is not None
        return layout.block.ne(0).long()

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        logits = super().logits(hidden)
        cap: Any = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
