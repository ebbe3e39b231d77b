"""Packing: which samples go together into one sequence of a fixed number of tokens.

The global batch then has B packs, one for each slot. Slot k still owns positions k, k + B, k + 2B, ... of the order and
packs from them alone, so what a pack holds depends on neither ranks, workers nor micro-batches:

    own positions, in order -> the slot's buffer of the next few samples -> the pack that fits best

The buffer is topped up from the order after each choice. A pack opens with the sample that has waited longest; then,
as long as anything fits, the longest sample that still does (best fit: it leaves the least room), samples that have
waited `age` packs before all others. So nothing is passed over for ever, and every position is used exactly once.

The state of a slot is the next position it will draw and what waits in its buffer: position, size, packs waited. It is
a few integers whatever the step, and going on from it reads nothing that was packed before. Sizes are part of it so
that a resumed run makes the very same packs; that they still hold is the recipe's identity's concern.

Every process packs all slots of its rank, for windows that another worker will read too. That takes each sample's
text, but none of its pictures: what a picture counts for is told by its size, which the index knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm.data.errors import DataError
from vlm.data.schema import Sample


class Size(NamedTuple):
    """What a sample takes up: tokens in the decoder's sequence (visual ones as many as are left after pruning), patches
    in the vision encoder (before it), and the length of its example's `tokens`, in which an image may be one."""

    tokens: int
    patches: int
    length: int


# A sample without its media, width and height of each medium in pixels, whose luck it is -> its size.
Measure = Callable[[Sample, Sequence[tuple[int, int]], Any], Size]


@dataclass(frozen=True)
class PackConfig:
    """How a slot packs: at most `tokens` and `patches` (None: no limit) in a pack, from the next `buffer` samples of
    which none waits for more than `age` packs while it fits.

    Raises:
        DataError: a number below 1.
    """

    tokens: int
    patches: int | None = None
    buffer: int = 64
    age: int = 16

    def __post_init__(self) -> None:
        for name in ("tokens", "patches", "buffer", "age"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"pack: {name}: expected at least 1, found {value}")

    def check(self, key: str, size: Size) -> Size:
        """The size itself if it fits an empty pack. Raises DataError naming the sample."""
        limits = (("tokens", size.tokens, self.tokens), ("patches", size.patches, self.patches))
        for name, found, most in limits:
            if most is not None and found > most:
                raise DataError(f"sample {key}: pack: expected at most {most} {name}, found {found}")
        return size


class Waiting(NamedTuple):
    """A sample in a buffer: where it stands in the order, its size, and how many packs were made without it."""

    position: int
    tokens: int
    patches: int
    packs: int = 0


class Packer:
    """The packs of one slot, one after the other.

    `draw(position)` gives tokens and patches of the sample at a position of the order; `step` leads from one position
    of the slot to the next.
    """

    def __init__(
        self,
        config: PackConfig,
        draw: Callable[[int], tuple[int, int]],
        position: int,
        step: int,
        waiting: Iterable[Sequence[int]] = (),
    ):
        self.config, self.draw, self.position, self.step = config, draw, position, step
        self.waiting = [Waiting(*entry) for entry in waiting]

    @property
    def state(self) -> dict[str, Any]:
        """What the next packs follow from, as plain numbers."""
        return {"position": self.position, "waiting": [list(entry) for entry in self.waiting]}

    def pack(self) -> list[int]:
        """Positions of the samples of the next pack, in the order in which they were chosen."""
        chosen: list[int] = []
        tokens, patches = self.config.tokens, self.config.patches
        self._fill()
        number: int | None = 0  # the oldest: it is never too large for an empty pack
        while number is not None:
            taken = self.waiting.pop(number)
            chosen.append(taken.position)
            tokens -= taken.tokens
            patches = None if patches is None else patches - taken.patches
            self._fill()
            number = self._best(tokens, patches)
        self.waiting = [entry._replace(packs=entry.packs + 1) for entry in self.waiting]
        return chosen

    def _fill(self) -> None:
        while len(self.waiting) < self.config.buffer:
            self.waiting.append(Waiting(self.position, *self.draw(self.position)))
            self.position += self.step

    def _best(self, tokens: int, patches: int | None) -> int | None:
        """Which of the buffer goes into what room is left: the oldest that is due, or the longest; None fits."""
        best, longest = None, 0
        for number, entry in enumerate(self.waiting):
            if entry.tokens > tokens or (patches is not None and entry.patches > patches):
                continue
            if entry.packs >= self.config.age:
                return number
            if entry.tokens > longest:
                best, longest = number, entry.tokens
        return best


class Planned(NamedTuple):
    """One window of a rank: the positions of each of its slots, and the slots' states after it."""

    positions: Mapping[int, Sequence[int]]
    state: dict[str, dict[str, Any]]


class PackPlan:
    """The windows of one rank by number, from the states of its slots at the first of them.

    Windows are asked for in ascending order as a rule; those between are packed and forgotten, and an earlier one
    starts anew.
    """

    def __init__(
        self,
        config: PackConfig,
        draw: Callable[[int], tuple[int, int]],
        step: int,
        start: Mapping[int, Mapping[str, Any]],
    ):
        self.config, self.draw, self.step, self.start = config, draw, step, start
        self._begin()

    def _begin(self) -> None:
        self._packers = {
            slot: Packer(self.config, self.draw, state["position"], self.step, state.get("waiting", ()))
            for slot, state in self.start.items()
        }
        self._done = 0

    def at(self, window: int) -> Planned:
        """The window of that number. Takes time in proportion to the windows since the one asked for before."""
        if window < self._done:
            self._begin()
        positions: dict[int, list[int]] = {}
        while self._done <= window:
            positions = {slot: packer.pack() for slot, packer in self._packers.items()}
            self._done += 1
        return Planned(positions, {str(slot): packer.state for slot, packer in self._packers.items()})


class Fill(NamedTuple):
    """How well samples of some lengths pack: the share of tokens that is not padding, and samples per pack."""

    share: float
    samples: float


def pack_fill(sizes: Sequence[tuple[int, int]], config: PackConfig) -> Fill:
    """How full packs of these samples (tokens, patches) get, in the order given and over and over.

    Samples too large for a pack are left out, as training skips them. Raises DataError when none is left.
    """
    fits = [size for size in sizes if size[0] <= config.tokens and size[1] <= (config.patches or size[1])]
    if not fits:
        largest = min(size[0] for size in sizes) if sizes else 0
        raise DataError(f"pack: tokens: expected room for a sample, the shortest of which has {largest}; found none")
    packer = Packer(config, lambda position: fits[position % len(fits)], 0, 1)
    tokens = samples = packs = 0
    while packs == 0 or packer.position < max(len(fits), 8 * config.buffer):
        chosen = packer.pack()
        tokens += sum(fits[position % len(fits)][0] for position in chosen)
        samples += len(chosen)
        packs += 1
    return Fill(tokens / (packs * config.tokens), samples / packs)
