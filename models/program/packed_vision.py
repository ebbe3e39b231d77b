"""A program inside a vision encoder that packs its pictures (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

Blocks there take the patches of all pictures as one row, with the bounds between which they attend and the rotary
table of the row. What is cut is a group of patches that the merger makes one visual token of, and what a cut leaves is
a shorter row: later blocks get its own bounds, those of windows too, and the rows of the table that belong to it.

To selectors a token is a group: its features are those of its patches side by side (what the merger takes as one),
its signals the mean of its patches'. They are read over the whole image, also in a block that attends inside windows;
only what patches get from all others (``PatchAttention(who="all")``) is read where they attend, inside the windows.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlm.models.errors import ModelError
from vlm.models.program.program import Program
from vlm.models.program.reduce import Reduced
from vlm.models.program.signals import Attention, PatchAttention, Signal
from vlm.models.program.vision import Around, Encoding, VisionEngine, Watch


class PackedEncoding(Encoding):
    """What is known of one pass over packed pictures; tokens are groups of ``unit`` patches, in raster order.

    order: where in the row each group of each image stood before any cut.
    """

    def __init__(
        self,
        seed: Callable[[], Int[Tensor, " images"]],
        real: Bool[Tensor, "images tokens"],
        columns: Int[Tensor, "images 1"],
        order: Int[Tensor, "images tokens"],
        unit: int,
    ) -> None:
        super().__init__(seed, torch.arange(len(real), device=real.device), real, columns)
        self.valid, self.order, self.unit = real, order, unit
        self._found: tuple[Tensor, Tensor, Tensor] | None = None  # the row, until the next cut

    @classmethod
    def of_grids(
        cls,
        seed: Callable[[], Int[Tensor, " images"]],
        shapes: Sequence[tuple[int, int]],
        window: int | None,
        unit: int,
        device: torch.device,
    ) -> "PackedEncoding":
        """Images of ``shapes`` (rows, columns) of groups, one after the other in the row. With ``window`` each stands
        there window after window of that side."""
        orders, start = [], 0
        for rows, cols in shapes:
            orders.append(start + _place_in_row(rows, cols, window))
            start += rows * cols
        order = pad_sequence(orders, batch_first=True, padding_value=-1).to(device)
        return cls(seed, order >= 0, order.new_tensor([[cols] for _, cols in shapes]), order, unit)

    def _row(self) -> tuple[Int[Tensor, " left"], Int[Tensor, " left"], Int[Tensor, "images tokens"]]:
        """The row as it is now: the number that each of its groups had before any cut, which of all images' tokens it
        is, and where in it each token stands (padding after its end)."""
        if self._found is not None:
            return self._found
        last = torch.iinfo(torch.long).max
        number = self.order.gather(1, self.place).masked_fill(~self.valid, last).flatten()
        token = number.argsort(stable=True)
        left = token[: int(self.valid.sum())]
        self._found = number[left], left, token.argsort().view_as(self.place)
        return self._found

    def take(self, reduced: Reduced, needed: Collection[Signal] = ()) -> None:
        super().take(reduced, needed)
        self._found = None

    def unpack(self, x: Float[Tensor, "patches width"]) -> Float[Tensor, "images tokens group_width"]:
        groups = x.reshape(-1, self.unit * x.shape[1])
        return groups[self._row()[2].clamp_max(len(groups) - 1)]

    def pack(self, tokens: Float[Tensor, "images tokens group_width"]) -> Float[Tensor, "patches width"]:
        return tokens.flatten(0, 1)[self._row()[1]].reshape(-1, tokens.shape[2] // self.unit)

    def spread(self, tokens: Float[Tensor, "left width"]) -> Float[Tensor, "all width"]:
        """Visual tokens of the groups that are left, at their places in the row before any cut; zeros elsewhere."""
        whole = tokens.new_zeros(int(self.total.sum()), tokens.shape[1])
        return whole.index_put((self._row()[0],), tokens)

    def marks(self) -> Bool[Tensor, "images tokens"]:
        """Which of the groups before any cut are left."""
        image, number = self.valid.nonzero(as_tuple=True)
        marks = torch.zeros_like(self.order, dtype=torch.bool)
        return marks.index_put((image, self.place[image, number]), torch.ones_like(image, dtype=torch.bool))

    def arguments(self, bounds: Int[Tensor, " chunks"], rotary: Sequence[Tensor]) -> dict[str, Any]:
        """Bounds and rotary tables [patches, dim] of a block for the row as it is now, from those before any cut."""
        number = self._row()[0]
        chunk = torch.searchsorted(bounds.long(), number * self.unit, right=True)
        lengths = chunk.unique_consecutive(return_counts=True)[1] * self.unit
        patches = (number[:, None] * self.unit + torch.arange(self.unit, device=number.device)).flatten()
        return {
            "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(bounds.dtype),
            "position_embeddings": tuple(table[patches] for table in rotary),
        }

    def of_groups(self, value: Float[Tensor, "patches *rest"]) -> Float[Tensor, "images tokens *rest"]:
        """The mean over the patches of each group of what was read of the row."""
        mean = value.unflatten(0, (-1, self.unit)).mean(1)
        return mean[self._row()[2].clamp_max(len(mean) - 1)]


def _place_in_row(rows: int, cols: int, window: int | None) -> Int[Tensor, " groups"]:
    """Where each group of an image, in raster order, stands in the image's row."""
    if window is None:
        return torch.arange(rows * cols)
    row, col = torch.arange(rows)[:, None] // window, torch.arange(cols) // window
    return (row * cols + col).flatten().argsort(stable=True).argsort()


class Call(NamedTuple):
    """An attention call of a block: one stretch of the row, [1, heads, patches, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None


class PackedEngine(VisionEngine):
    """The encoder's part of a program, lowered onto blocks over packed pictures. Made by ``attach``."""

    def __init__(self, encoder: Any, program: Program, layers: int, impl: str) -> None:
        super().__init__(encoder, program, layers, impl)
        if weighed := [site for site, op in self.cuts.items() if op.weigh]:
            raise ModelError(f"{weighed[0]}: attention of packed pictures cannot weigh merged tokens by their size")

    def watcher(self, number: int, block: nn.Module) -> "Around":
        return _AroundPacked(self, number, block)

    def patches(self, now: Encoding, x: Float[Tensor, "patches width"]) -> Float[Tensor, "images tokens group_width"]:
        assert isinstance(now, PackedEncoding)
        return now.unpack(x)

    def put_back(self, now: Encoding, left: Float[Tensor, "images tokens group_width"], x: Tensor) -> Tensor:
        assert isinstance(now, PackedEncoding)
        return now.pack(left)

    @torch.no_grad()
    def read_row(self, layer: int, calls: Sequence[Call]) -> None:
        """Enter the signals of a block from its attention calls."""
        now = packed(self)
        assert now is not None
        parts = zip(*(call[:3] for call in calls), strict=True)
        row = [torch.cat(part, 2)[0].detach().transpose(0, 1) for part in parts]  # three of [patches, heads, dim]
        images, windows = (now.valid.sum(1) * now.unit).tolist(), [call.q.shape[2] for call in calls]
        for signal in self.needs[layer]:
            lengths = windows if isinstance(signal, PatchAttention) and signal.who == "all" else images
            now.signals[signal] = self._read_padded(signal, now, row, lengths, calls[0].scale)

    def _read_padded(
        self, signal: Signal, now: PackedEncoding, row: Sequence[Tensor], lengths: list[int], scale: float | None
    ) -> Tensor:
        """A signal's values of the groups, read over stretches of the row as if each were a picture."""
        q, k, v = (pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2) for x in row)  # [S,H,L,D]
        count = torch.tensor(lengths, device=q.device)
        valid = torch.arange(q.shape[2], device=q.device) < count[:, None]
        common: Any = {"causal": False, "scale": scale, "validate": False}
        common["key_valid"] = None if min(lengths) == max(lengths) else valid
        value = signal.read(Attention(q, k, v, valid, common, self.impl))
        return now.of_groups(value.movedim(signal.key_axis, 1)[valid]).movedim(1, signal.key_axis)


def packed(engine: VisionEngine) -> PackedEncoding | None:
    """What is known of the pass that runs under ``engine``, if one does."""
    now = engine.now
    assert now is None or isinstance(now, PackedEncoding)
    return now


class _AroundPacked(Around):
    """Hooks around one block: its bounds and rotary table, a mode that sees its attention, a cut of what leaves it."""

    engine: PackedEngine

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.engine.begin_block(self.number, args[0])
        now = packed(self.engine)
        self.calls: list[Call] = []
        watched = now is not None and self.number in self.engine.needs
        mode = Watch(lambda *call: self.calls.append(Call(*call)) if watched else None, None)
        self.modes.append(mode)
        mode.start()
        if now is None or not now.cut:
            return None
        if missing := {"cu_seqlens", "position_embeddings"} - kwargs.keys():
            name = type(block).__name__
            raise ModelError(f"vit: block {self.number} ({name}): expected {min(missing)} by name; found {[*kwargs]}")
        return args, kwargs | now.arguments(kwargs["cu_seqlens"], kwargs["position_embeddings"])

    def look(self, block: nn.Module, mode: Watch) -> None:
        """Read the block's signals. Raises ModelError for a block whose attention did not show all of its row."""
        now, calls, self.calls = packed(self.engine), self.calls, []
        if now is None or self.number not in self.engine.needs:
            return
        seen, expected = sum(call.q.shape[2] for call in calls), int(now.valid.sum()) * now.unit
        if seen != expected:
            raise ModelError(
                f"vit: block {self.number} ({type(block).__name__}): expected calls of torch's "
                f"scaled_dot_product_attention, which programs in the encoder watch, for {expected} patches; found "
                f"{seen} (attention implementation other than sdpa?)"
            )
        self.engine.read_row(self.number, calls)
