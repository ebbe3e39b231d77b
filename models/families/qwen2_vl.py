"""Qwen2-VL and Qwen2.5-VL: images of any size as one grid each, positions on three axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.family import Family, Picture, raster
from vlm.models.tower import PackedTower


class Qwen2Vl(Family):
    """Qwen2-VL and Qwen2.5-VL: native resolution, merged patches, multimodal rotary positions (M-RoPE).

    A cut in the encoder drops whole groups of patches, each of which becomes one visual token; those that stay keep the
    positions of their true places.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    places: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision": ("model.visual",),
        "connector": ("model.visual.merger",),
        "language": ("model.language_model", "lm_head"),
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "reindex": "position ids on three axes cannot be counted anew; set position: keep (found reindex)",
        "vit.mid": "patches that the connector merges go together here, from block to block and not inside one; use a "
        "pruner that cuts at vit.after, vit.out or llm.in",
        "vit.resid": "this vision encoder packs images of many sizes, so no place in it is the same in all",
        "patch_features": "this vision encoder hands over groups of patches",
    }

    @property
    def tower(self) -> PackedTower:
        return PackedTower(self.model.model.visual)

    def kept(
        self, marks: Bool[Tensor, "images most"], media: Mapping[str, Tensor]
    ) -> Sequence[Bool[Tensor, " tokens"]]:
        counts = media["image_grid_thw"].prod(1) // self.config.vision_config.spatial_merge_size**2
        return [own[:count] for own, count in zip(marks, counts.tolist(), strict=True)]

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        grids = media["image_grid_thw"]  # [N,3] time, rows, columns, in patches
        found = self.model.model.get_image_features(media["pixel_values"], grids, return_dict=True)
        pixels = media["pixel_values"].split(grids.prod(1).tolist())
        columns = (grids[:, 2] // self.config.vision_config.spatial_merge_size).tolist()
        counts = [len(features) for features in found.pooler_output]
        deep: Sequence[Sequence[Tensor]] = list(zip(*self._deep(found, counts), strict=True)) or [()] * len(counts)
        return [raster(*image) for image in zip(found.pooler_output, columns, pixels, deep, strict=True)]

    def _deep(self, found: Any, counts: Sequence[int]) -> list[Sequence[Tensor]]:
        """Features of each image for the first decoder layers: level by level."""
        return []

    def map_pixels(self, media: Mapping[str, Tensor], change: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
        """A picture is a row for each patch, in which it stands once for each of the patch's frames."""
        frames, pixels = self.config.vision_config.temporal_patch_size, media["pixel_values"]
        pictures = []
        for number, rows in enumerate(pixels.split(media["image_grid_thw"].prod(1).tolist())):
            patches = rows.unflatten(1, (-1, frames, self.config.vision_config.patch_size**2))  # [P,C,T,p*p]
            once = change(patches[:, :, 0].flatten(1), number).unflatten(1, (patches.shape[1], -1))  # [P,C,p*p]
            pictures.append(once[:, :, None].expand_as(patches).flatten(1))
        return {**media, "pixel_values": torch.cat(pictures)}

    def blank(self) -> dict[str, Tensor]:
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(merge**2, numbers), "image_grid_thw": torch.tensor([[1, merge, merge]])}

    def axes(
        self,
        tokens: Int[Tensor, "batch length"],
        valid: Bool[Tensor, "batch length"],
        visual: Bool[Tensor, "batch length"],
        media: Mapping[str, Tensor],
    ) -> Int[Tensor, "batch length 3"]:
        if "image_grid_thw" not in media:
            return (valid.long().cumsum(1) - 1).clamp_min(0)[..., None].expand(-1, -1, 3)
        ids, _ = self.model.model.get_rope_index(
            tokens, visual.int(), image_grid_thw=media["image_grid_thw"], attention_mask=valid.long()
        )
        return ids.permute(1, 2, 0)
