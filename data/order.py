"""Which sample comes at which position: a pure function of source sizes, weights, seed and kind of shuffle.

Nothing is counted along the way, so any position can be asked for at once: that is what makes resuming instant and the
order the same for every number of ranks and workers.

* Mixture: positions are cut into blocks of `BLOCK`. In each block every source has the same share, its weight rounded
  by largest remainder; a permutation of the block says which position is whose.
  Where sources are repeated instead, a block is a whole round: every source has a place for each of its samples as
  often as it is repeated, so a round ends with each sample read exactly so many times.
* Source: its n-th turn overall is turn n mod size of epoch n div size, and each epoch has a permutation of its own.

Permutations sort a hash (splitmix64) of the sample numbers. They stay the same across versions of numpy, whose random
streams may change; a run resumed after an upgrade must not change its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np

from vlm.data.errors import DataError

BLOCK = 1024
OPEN_SHARDS = 8
_KEPT = 2  # a window that crosses the end of an epoch asks for both sides in turn
_KEPT_BLOCKS = 64  # slots that pack get ahead of each other

T = TypeVar("T")
Shuffle = Literal["full", "shards", "none"]


class Place(NamedTuple):
    """One position of the order: which source, which of its samples, and in which of its epochs."""

    source: int
    number: int
    epoch: int


class Order:
    """The order of a mixture of sources with `sizes` samples each.

    `weights` are relative shares of the positions. `shuffle="full"` permutes a source's samples; "shards" permutes its
    shards and shuffles inside groups of `OPEN_SHARDS` of them, so that remote reads stay sequential (`shard_sizes` says
    how many samples each shard of each source holds); "none" keeps the order of the shards. With `repeat` the weights
    are whole numbers: how often each source is read in a round of `block` positions.

    Raises:
        DataError: no source, an empty source with a weight, a bad weight, or one too small to get a place in a block.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        shuffle: Shuffle = "full",
        shard_sizes: Sequence[Sequence[int]] | None = None,
        repeat: bool = False,
    ):
        self.sizes, self.seed, self.shuffle = tuple(sizes), seed, shuffle
        self.shard_sizes = None if shard_sizes is None else [tuple(of_source) for of_source in shard_sizes]
        self._check(weights)
        if repeat:
            self.shares = [round(times) * size for times, size in zip(weights, sizes, strict=True)]
            if any(times != round(times) for times in weights):
                raise DataError(f"repeat: expected whole numbers, found {list(weights)}")
        else:
            self.shares = shares(weights, BLOCK)
        self.block = sum(self.shares)
        for source, share in enumerate(self.shares):
            if weights[source] > 0 and share == 0:
                least = sum(weights) / BLOCK
                raise DataError(
                    f"source {source}: expected a weight of 0 or about {least:g}, found {weights[source]:g}"
                )
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._epochs: list[dict[int, np.ndarray]] = [{} for _ in sizes]

    def at(self, position: int) -> Place:
        """The sample at a position. O(1) apart from permutations, of which the latest two per source are kept."""
        if position < 0:
            raise DataError(f"position: expected at least 0, found {position}")
        block, place = divmod(position, self.block)
        source, turn = self._turn(block, place)
        epoch, offset = divmod(block * self.shares[source] + turn, self.sizes[source])
        return Place(source, int(self._permutation(source, epoch)[offset]), epoch)

    def _turn(self, block: int, place: int) -> tuple[int, int]:
        """Whose place of the block it is, and how many of that source's places come before it."""
        if len(self.sizes) == 1:
            return 0, place
        sources, turns = _recent(
            self._blocks, block, lambda: self._block(block), _KEPT_BLOCKS if self.block == BLOCK else _KEPT
        )
        return int(sources[place]), int(turns[place])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        own = np.repeat(np.arange(len(self.sizes)), self.shares)
        sources = own[permutation(self.block, self.seed, 0, block)]
        turns = np.empty(self.block, np.int64)
        for source, share in enumerate(self.shares):
            turns[sources == source] = np.arange(share)
        return sources, turns

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        return _recent(self._epochs[source], epoch, lambda: self._permute(source, epoch))

    def _permute(self, source: int, epoch: int) -> np.ndarray:
        size = self.sizes[source]
        if self.shuffle == "none":
            return np.arange(size)
        if self.shuffle == "full":
            return permutation(size, self.seed, 1, source, epoch)
        assert self.shard_sizes is not None, "checked at the start"
        return self._permute_shards(self.shard_sizes[source], source, epoch)

    def _permute_shards(self, counts: Sequence[int], source: int, epoch: int) -> np.ndarray:
        ends = list(accumulate(counts))
        order = permutation(len(counts), self.seed, 2, source, epoch)
        groups = []
        for start in range(0, len(order), OPEN_SHARDS):
            shards = order[start : start + OPEN_SHARDS]
            samples = np.concatenate([np.arange(ends[n] - counts[n], ends[n]) for n in shards.tolist()])
            groups.append(samples[permutation(len(samples), self.seed, 3, source, epoch, start)])
        return np.concatenate(groups)

    def _check(self, weights: Sequence[float]) -> None:
        if self.shuffle not in get_args(Shuffle):
            raise DataError(f"shuffle: expected one of {', '.join(get_args(Shuffle))}, found {self.shuffle!r}")
        if not self.sizes or len(weights) != len(self.sizes):
            raise DataError(f"weights: expected one for each of {len(self.sizes)} sources, found {len(weights)}")
        if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
            raise DataError(f"weights: expected numbers of at least 0, not all 0, found {list(weights)}")
        for source, (size, weight) in enumerate(zip(self.sizes, weights, strict=True)):
            if weight > 0 and size < 1:
                raise DataError(f"source {source}: expected samples, found none")
        if self.shuffle == "shards" and [sum(counts) for counts in self.shard_sizes or []] != list(self.sizes):
            raise DataError("shuffle by shards: expected shard sizes that add up to the size of each source")


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` places dealt by weight: whole parts first, the rest to the largest remainders (ties: first source)."""
    exact = [weight * total / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (counts[source] - exact[source], source))
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return counts


def permutation(size: int, *stream: int) -> np.ndarray:
    """A permutation of 0..size-1 that depends on nothing but the numbers of `stream`."""
    state = np.zeros(1, np.uint64)  # an array, for scalars warn when they wrap round
    for number in stream:
        state = _mix(state + np.array([number % 2**64], np.uint64))
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) + state), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele et al. 2014), after its golden-ratio step; arithmetic is modulo 2^64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _recent(kept: dict[int, T], number: int, make: Callable[[], T], most: int = _KEPT) -> T:
    """`kept[number]`, made if missing; the oldest goes when there are more than `most`."""
    if number not in kept:
        while len(kept) >= most:
            kept.pop(next(iter(kept)))
        kept[number] = make()
    return kept[number]
