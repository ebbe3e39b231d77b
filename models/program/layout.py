"""The layout of a token sequence: for every place, what stands there. Whoever cuts or extends a sequence
calls :meth:`Layout.take` or :meth:`Layout.append`; whoever acts later reads the new map and needs no offsets."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD, TEXT, IMAGE = 0, 1, 2

Side = Literal["left", "right"]


class Layout(NamedTuple):
    """The integer map of a batch of token sequences; every field is [batch, length].

    role: PAD, TEXT or IMAGE. image: which image of the batch (order of ``images``), -1 elsewhere.
    row, col: place in the image's grid of visual tokens, -1 elsewhere. position: position id.
    sample: which sample of the batch a token belongs to (the row, unless rows are packed).
    source: index of the token in the sequence as the data layer made it (an image's tokens share its placeholder's).

    Two fields that few models have: axes, position ids on three axes (time, height, width; ``position`` is then the
    largest of the three), and block: tokens of one block see each other whatever their order, -1 is plain causality.
    """

    role: Int[Tensor, "batch length"]
    image: Int[Tensor, "batch length"]
    row: Int[Tensor, "batch length"]
    col: Int[Tensor, "batch length"]
    position: Int[Tensor, "batch length"]
    sample: Int[Tensor, "batch length"]
    source: Int[Tensor, "batch length"]
    axes: Int[Tensor, "batch length 3"] | None = None
    block: Int[Tensor, "batch length"] | None = None

    @property
    def valid(self) -> Bool[Tensor, "batch length"]:
        return self.role != PAD

    @property
    def visual(self) -> Bool[Tensor, "batch length"]:
        return self.role == IMAGE

    def take(self, index: Int[Tensor, "batch kept"], valid: Bool[Tensor, "batch kept"]) -> "Layout":
        """The layout of the sequence gathered by ``index``; places that are not ``valid`` become padding."""
        fields: list[Any] = [None if field is None else _gather(field, index) for field in self]
        taken = Layout(*fields)
        return taken._replace(role=taken.role.masked_fill(~valid, PAD), image=taken.image.masked_fill(~valid, -1))

    def append(self, count: int = 1) -> "Layout":
        """The layout with ``count`` generated text tokens after it, each at the next position id."""
        batch, device = self.role.shape[0], self.role.device
        fresh = torch.full((batch, count), -1, device=device)
        last = self.position.masked_fill(~self.valid, -1).amax(1, keepdim=True)  # [B,1]
        position = last + 1 + torch.arange(count, device=device)
        tail = Layout(
            role=torch.full_like(fresh, TEXT),
            image=fresh,
            row=fresh,
            col=fresh,
            position=position,
            sample=self.sample.amax(1, keepdim=True).expand(-1, count),
            source=fresh,
            axes=None if self.axes is None else position[..., None].expand(-1, -1, 3),
            block=None if self.block is None else fresh,
        )
        pairs = zip(self, tail, strict=True)
        fields: list[Any] = [None if old is None or new is None else torch.cat([old, new], 1) for old, new in pairs]
        return Layout(*fields)

    def position_ids(self, rows: int) -> Int[Tensor, "*three batch rows"]:
        """Position ids of the last ``rows`` places as a decoder takes them: [batch, rows] or [3, batch, rows]."""
        ids = self.position if self.axes is None else self.axes.permute(2, 0, 1)
        return ids[..., ids.shape[-1] - rows :]

    def reindexed(self) -> "Layout":
        """The layout with position ids 0, 1, 2 ... over its valid places, for positions of one axis."""
        return self._replace(position=(self.valid.long().cumsum(1) - 1).clamp_min(0))

    def last(self, mask: Bool[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """Index of the last place of each row where ``mask`` holds, -1 where there is none."""
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return (mask * places).amax(1) - 1


def _gather(field: Int[Tensor, "batch length *axes"], index: Int[Tensor, "batch kept"]) -> Tensor:
    return field.gather(1, index if field.ndim == 2 else index[..., None].expand(-1, -1, field.shape[2]))


def compact(
    keep: Bool[Tensor, "batch length"], side: Side
) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Indices that gather the kept places of each row in order, rows padded to one length on ``side``.

    Returns the index and which of its places are real.
    """
    counts = keep.sum(1, keepdim=True)  # [B,1]
    longest = int(counts.max()) if keep.numel() else 0
    place = torch.arange(longest, device=keep.device)
    if side == "right":
        order = keep.int().argsort(dim=1, descending=True, stable=True)  # kept first, in order
        return order[:, :longest], place < counts
    order = keep.int().argsort(dim=1, stable=True)  # kept last, in order
    return order[:, order.shape[1] - longest :], place >= longest - counts
