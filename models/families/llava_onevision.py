"""LLaVA-OneVision: packed as LLaVA-NeXT; large grids are shrunk, and only a sample's single image is tiled."""

from typing import ClassVar

from vlm.models.families.llava_next import LlavaNext
from vlm.models.tower import Tower


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: Easy Visual Task Transfer, any resolution with at most nine tiles' worth of tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    also: ClassVar[tuple[str, ...]] = ("batch_num_images",)

    @property
    def tower(self) -> Tower | None:
        """None: a large grid of projected features is resized, which mixes its tokens."""
        return None
