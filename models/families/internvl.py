"""InternVL in the format of Transformers: the tokens of an image's tiles without anything between them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.family import Family, Picture, raster


class InternVl(Family):
    """InternVL 2.5 and 3: tiles, the whole image last, pixel shuffle and an MLP.

    A batch does not say how tiles lie in their image, so their grids stand one below the other.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def whole_view(self, rows: int, cols: int) -> tuple[int, int, int]:
        return rows - cols, cols, cols  # square tiles, the whole image last

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels = media["pixel_values"]  # [tiles,3,H,W]
        found = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return [raster(tile, int(len(tile) ** 0.5), image) for tile, image in zip(found, pixels, strict=True)]

    def join(self, pictures: Sequence[Picture], visual: Bool[Tensor, "batch length"]) -> Sequence[Picture]:
        """Tiles whose tokens stand in one run are one image."""
        joined: list[Picture] = []
        left = list(pictures)
        starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        run = starts.flatten().cumsum(0)[visual.flatten()]
        for length in run.unique_consecutive(return_counts=True)[1].tolist():
            tiles = [left.pop(0) for _ in range(length // len(left[0].features))]
            if sum(len(tile.features) for tile in tiles) != length:
                raise ModelError(f"expected a run of image tokens to hold whole tiles; found {length} tokens")
            side = int(len(tiles[0].features) ** 0.5)
            rows = [tile.row + number * side for number, tile in enumerate(tiles)]
            features, cols = torch.cat([tile.features for tile in tiles]), torch.cat([tile.col for tile in tiles])
            joined.append(Picture(features, torch.cat(rows), cols, torch.cat([tile.pixels for tile in tiles])))
        return joined

    def blank(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(1, 3, *self.config.vision_config.image_size)}
