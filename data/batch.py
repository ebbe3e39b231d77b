"""Examples, and the padded batch a model takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.data.errors import DataError
from vlm.data.images import joined


@dataclass
class Example:
    """One sample ready for the model: token ids with ONE placeholder id per image, and what they are worth.

    `weights[t]` is the loss weight of predicting `tokens[t]`; 0 where it is not supervised. `position` is the place in
    the global order. Where pictures are tiled, `tiles` has an entry for each image (see `vlm.data.images.Views`) and
    `images` its views one after the other; otherwise `images` are the images themselves. `rejected`: in a preference
    pair, the same sample with its rejected answer, over the same images.
    """

    key: str
    tokens: list[int]
    weights: list[float]
    images: Float[Tensor, "views 3 height width"]
    tags: tuple[str, ...] = ()
    position: int = -1
    tiles: tuple[tuple[int, int, int, int], ...] = ()
    rejected: "Example | None" = None

    @property
    def image_count(self) -> int:
        """How many images the sample shows."""
        return len(self.tiles) or len(self.images)


@dataclass
class Batch:
    """Examples side by side, right-padded with `pad_id`.

    `weights[b, t]` is the loss weight of predicting `tokens[b, t]`. The n-th placeholder in row b stands for the n-th
    image whose `image_owner` is b. All images of a batch have one size; pictures that keep their shape stand in the
    upper left corner, and `tiles` says how much of it they are.

    `tiles` is None where every image is one view. Otherwise row n says of image n: rows and columns of its tiles (0 and
    0: it is shown whole only), height and width of the picture; `images` then are views, those of one image together:
    whole, then its tiles row by row.

    `rejected`, in a batch of preference pairs, holds the same samples with their rejected answers; its tensors of
    images are those of this batch, not copies of them.

    `pack` is None where every example is a sequence of its own; otherwise it says which sequence each goes into.
    """

    tokens: Int[Tensor, "batch tokens"]
    length: Int[Tensor, " batch"]
    weights: Float[Tensor, "batch tokens"]
    images: Float[Tensor, "views 3 height width"]
    image_owner: Int[Tensor, " images"]
    keys: list[str]
    tags: list[tuple[str, ...]]
    tiles: Int[Tensor, "images 4"] | None = None
    rejected: "Batch | None" = None
    pack: Int[Tensor, " batch"] | None = None

    @property
    def token_count(self) -> int:
        """Tokens of text and placeholders, without padding; of a pair those of both sequences."""
        return int(self.length.sum()) + (0 if self.rejected is None else self.rejected.token_count)

    @property
    def whole_images(self) -> Float[Tensor, "images 3 height width"]:
        """Each image as its whole view."""
        if self.tiles is None:
            return self.images
        views = 1 + self.tiles[:, 0] * self.tiles[:, 1]
        return self.images[views.cumsum(0) - views]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU can overlap with work."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed, each once, so that what was shared stays shared."""
        done: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = function(tensor)
            return done[id(tensor)]

        return _changed(self, once)


def _changed(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A value with every tensor in it changed: batches in batches and mappings too."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Batch):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _changed(inner, function) for name, inner in named.items()})
    if isinstance(value, Mapping):
        return {name: _changed(inner, function) for name, inner in value.items()}
    return value


def blank_example(pad_id: int, key: str = "", position: int = -1) -> Example:
    """What stands in for an unreadable sample: one padding token that nobody learns, and no image."""
    return Example(key, [pad_id], [0.0], torch.zeros(0, 3, 0, 0), position=position)


def collate(examples: Sequence[Example], pad_id: int) -> "Batch":
    """Pad and stack. Raises DataError if images differ in size, views are not those of the tiles, or an example has no
    tokens."""
    for example in examples:
        if not example.tokens or len(example.tokens) != len(example.weights):
            found = f"{len(example.tokens)} and {len(example.weights)}"
            raise DataError(
                f"sample {example.key}: expected one weight per token and at least one token, found {found}"
            )
    tokens = [torch.tensor(example.tokens) for example in examples]
    weights = [torch.tensor(example.weights, dtype=torch.float32) for example in examples]
    owners = [row for row, example in enumerate(examples) for _ in range(example.image_count)]
    return Batch(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        length=torch.tensor([len(row) for row in tokens]),
        weights=pad_sequence(weights, batch_first=True),
        images=_stack_images(examples),
        image_owner=torch.tensor(owners, dtype=torch.int64),
        keys=[example.key for example in examples],
        tags=[example.tags for example in examples],
        tiles=_tile_table(examples),
    )


def _tile_table(examples: Sequence[Example]) -> Int[Tensor, "images 4"] | None:
    """The tiles of all images, None where none is tiled."""
    if not any(example.tiles for example in examples):
        return None
    for example in examples:
        views = sum(1 + rows * columns for rows, columns, _, _ in example.tiles)
        if views != len(example.images):
            raise DataError(
                f"sample {example.key}: image: expected {views} views for its tiles, found {len(example.images)}"
            )
    return torch.tensor([entry for example in examples for entry in example.tiles])


def _stack_images(examples: Sequence[Example]) -> Float[Tensor, "images 3 height width"]:
    """All images in reading order; none at all gives a tensor of no images and no size."""
    shown = [example for example in examples if len(example.images)]
    if not shown:
        return torch.zeros(0, 3, 0, 0)
    for example in shown:
        expected, found = tuple(shown[0].images.shape[1:]), tuple(example.images.shape[1:])
        own_shape = example.tiles and not any(rows for rows, _, _, _ in example.tiles)
        if found != expected and not own_shape:
            raise DataError(f"sample {example.key}: image: expected the batch's shape {expected}, found {found}")
    return joined([example.images for example in shown])
