"""Examples, and the padded batch a model takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.data.errors import DataError


@dataclass
class Example:
    """One sample ready for the model: token ids with ONE placeholder id per image, and what they are worth.

    `weights[t]` is the loss weight of predicting `tokens[t]`; 0 where it is not supervised. `position` is the place in
    the global order.
    """

    key: str
    tokens: list[int]
    weights: list[float]
    images: Float[Tensor, "images 3 height width"]
    tags: tuple[str, ...] = ()
    position: int = -1


@dataclass
class Batch:
    """Examples side by side, right-padded with `pad_id`.

    `weights[b, t]` is the loss weight of predicting `tokens[b, t]`. The n-th placeholder in row b stands for the n-th
    image whose `image_owner` is b. All images of a batch have one size.
    """

    tokens: Int[Tensor, "batch tokens"]
    length: Int[Tensor, " batch"]
    weights: Float[Tensor, "batch tokens"]
    images: Float[Tensor, "images 3 height width"]
    image_owner: Int[Tensor, " images"]
    keys: list[str]
    tags: list[tuple[str, ...]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU can overlap with work."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            field.name: function(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def blank_example(pad_id: int, key: str = "", position: int = -1) -> Example:
    """What stands in for an unreadable sample: one padding token that nobody learns, and no image."""
    return Example(key, [pad_id], [0.0], torch.zeros(0, 3, 0, 0), position=position)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad and stack. Raises DataError if images differ in size or an example has no tokens."""
    for example in examples:
        if not example.tokens or len(example.tokens) != len(example.weights):
            found = f"{len(example.tokens)} and {len(example.weights)}"
            raise DataError(
                f"sample {example.key}: expected one weight per token and at least one token, found {found}"
            )
    tokens = [torch.tensor(example.tokens) for example in examples]
    weights = [torch.tensor(example.weights, dtype=torch.float32) for example in examples]
    owners = [row for row, example in enumerate(examples) for _ in range(len(example.images))]
    return Batch(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        length=torch.tensor([len(row) for row in tokens]),
        weights=pad_sequence(weights, batch_first=True),
        images=_stack_images(examples),
        image_owner=torch.tensor(owners, dtype=torch.int64),
        keys=[example.key for example in examples],
        tags=[example.tags for example in examples],
    )


def _stack_images(examples: Sequence[Example]) -> Float[Tensor, "images 3 height width"]:
    """All images in reading order; none at all gives a tensor of no images and no size."""
    shown = [example for example in examples if len(example.images)]
    if not shown:
        return torch.zeros(0, 3, 0, 0)
    for example in shown:
        expected, found = tuple(shown[0].images.shape[1:]), tuple(example.images.shape[1:])
        if found != expected:
            raise DataError(f"sample {example.key}: image: expected the batch's shape {expected}, found {found}")
    return torch.cat([example.images for example in shown])
