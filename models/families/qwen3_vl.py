"""Qwen3-VL: as Qwen2.5-VL, and features of earlier encoder layers are added in the first decoder layers."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm.models.families.qwen2_vl import Qwen2Vl


class Qwen3Vl(Qwen2Vl):
    """Qwen3-VL with DeepStack (Meng et al., 2024)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    places: ClassVar[Mapping[str, Sequence[str]]] = {
        **Qwen2Vl.places,
        "connector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    }

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.deep = len(self.config.vision_config.deepstack_visual_indexes)

    def _deep(self, found: Any, counts: Sequence[int]) -> list[Sequence[Tensor]]:
        # Transformers gives one tensor a level before 5.18 or so, and one tensor an image after.
        levels = [x if isinstance(x, Tensor) else torch.cat(tuple(x)) for x in found.deepstack_features]
        return [level.split(list(counts)) for level in levels]
