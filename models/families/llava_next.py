"""LLaVA-NeXT: the whole image, then its tiles without their padding, each row of the tiles ended by a newline token."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlm.models.family import Family, Picture, after_features, plain_tower
from vlm.models.tower import Tower, Views


class LlavaNext(Family):
    """LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (any resolution).

    The rows of the tiles' grid stand below those of the whole image. A cut before the connector shares an image's
    budget out among the whole and the tiles by their tokens; a newline stays as long as a token of its row does.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    places: ClassVar[Mapping[str, Sequence[str]]] = {
        **Family.places,
        "connector": ("model.multi_modal_projector", "model.image_newline"),
    }
    also: ClassVar[tuple[str, ...]] = ()  # media besides pixels and sizes that say how images are packed

    @property
    def tower(self) -> Tower | None:
        return plain_tower(self.model)

    @property
    def idle(self) -> Sequence[str]:
        return after_features(self.model)

    def whole_view(self, rows: int, cols: int) -> tuple[int, int, int]:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return 0, side, side

    def pictures(self, media: Mapping[str, Tensor]) -> list[Picture]:
        pixels, sizes = media["pixel_values"], media["image_sizes"]  # [N,P,3,H,W], [N,2]
        more: dict[str, Any] = {name: media[name] for name in self.also if name in media}
        found = self.model.model.get_image_features(pixels, sizes, return_dict=True, **more).pooler_output
        vision = self.config.vision_config
        side, newline = vision.image_size // vision.patch_size, self.model.model.image_newline
        return [_stacked(features, side, newline, tiles) for features, tiles in zip(found, pixels, strict=True)]

    def views(self, media: Mapping[str, Tensor]) -> Views:
        counts = self._tiles(media)
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(media["image_sizes"].device)
        patches = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        real = torch.zeros(len(image) * patches, dtype=torch.bool, device=image.device)
        for slots in self._slots(media):
            real[slots[slots >= 0]] = True
        return Views(image, real.unflatten(0, (len(image), patches)))

    def kept(
        self, marks: Bool[Tensor, "views patches"], media: Mapping[str, Tensor]
    ) -> Sequence[Bool[Tensor, " tokens"]]:
        return [_with_newlines(marks.flatten(), slots, marks.shape[1]) for slots in self._slots(media)]

    def slots(self, media: Mapping[str, Tensor], shape: Sequence[int]) -> Sequence[Int[Tensor, " tokens"]]:
        return self._slots(media)

    def _tiles(self, media: Mapping[str, Tensor]) -> list[int]:
        """Pictures that the encoder sees of each image, the whole one among them."""
        points, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [image_size_to_num_patches(size, points, side) for size in media["image_sizes"]]

    def _slots(self, media: Mapping[str, Tensor]) -> list[Int[Tensor, " tokens"]]:
        """For every token of each image: which patch of all the batch's pictures it is, -1 for a newline.

        Transformers arranges numbers as it arranges features.
        """
        counts, sizes = self._tiles(media), media["image_sizes"]
        patches = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        number = torch.arange(sum(counts) * patches, dtype=torch.float64, device=sizes.device)
        packed, _ = self.model.model.pack_image_features(
            number.view(-1, patches, 1).split(counts),
            sizes,
            self.config.vision_feature_select_strategy,
            image_newline=number.new_tensor([-1.0]),
        )
        return [one[:, 0].long() for one in packed]

    def blank(self) -> dict[str, Tensor]:
        side = self.config.vision_config.image_size
        tiles = {"pixel_values": torch.zeros(1, 32, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
        return tiles | {"batch_num_images": torch.tensor([2])}


def _with_newlines(
    marks: Bool[Tensor, " patches"], slots: Int[Tensor, " tokens"], whole: int
) -> Bool[Tensor, " tokens"]:
    """The tokens that stay: those of kept patches, and newlines of rows that have one. The first ``whole`` tokens are
    the whole image; a newline right after them ends it."""
    newline = slots < 0
    kept = marks[slots.clamp_min(0)] & ~newline
    row = (newline.cumsum(0) - newline.long())[whole:]
    tiles = torch.zeros_like(row).scatter_add(0, row, kept[whole:].long())
    if len(row) == 1:
        tiles = kept.long().sum()[None]
    return torch.cat([kept[:whole], kept[whole:] | (newline[whole:] & (tiles[row] > 0))])


def _stacked(features: Tensor, side: int, newline: Tensor, pixels: Tensor) -> Picture:
    """A grid of side x side tokens, below it rows of tokens that newlines end."""
    ends = (features[side**2 :] == newline.to(features)).all(1).long()
    row = ends.cumsum(0) - ends
    place = torch.arange(len(ends), device=features.device)
    starts = torch.zeros_like(row).scatter_reduce(0, row, place, "amin", include_self=False)
    base = torch.arange(side**2, device=features.device)
    col = place - starts[row]
    return Picture(features, torch.cat([base // side, side + row]), torch.cat([base % side, col]), pixels)
