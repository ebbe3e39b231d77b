"""The training stream: windows of the global batch, in an order that no number of processes can change.

    Order (position -> sample) -> slots of the global batch -> windows of one rank -> workers -> micro-batches

The global batch has B slots; slot k owns positions k, k+B, k+2B, ... A rank owns B/world slots side by side, and one
optimizer step of it is a window: the next position of each. Workers prepare whole windows in turn. The state after a
window travels with its micro-batches, so what was prefetched and never consumed was never counted.

Where samples are packed, a slot's share of a window is a pack instead of a sample: B, the micro-batch and the steps
count packs, and how far each slot has got depends on what fitted (see `vlm.data.pack`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.batch import Batch, Example, blank_example
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.order import Order, Shuffle
from vlm.data.pack import Measure, PackConfig, PackPlan, Planned, Size
from vlm.data.schema import Sample
from vlm.data.store import Store

log = logging.getLogger(__name__)

STATE_VERSION = 1
State = dict[str, Any]


@dataclass(frozen=True)
class StreamConfig:
    """Sizes of the stream: samples (or packs) per step of all ranks, per micro-batch of one rank; ranks; workers; steps
    in all.

    Raises:
        DataError: the micro-batch does not divide the global batch, or the world does not divide what remains.
    """

    global_batch: int
    micro_batch: int
    world: int
    rank: int
    workers: int
    seed: int
    steps: int

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.global_batch < 1 or self.global_batch % self.micro_batch:
            raise DataError(f"micro_batch: expected a divisor of {self.global_batch}, found {self.micro_batch}")
        legal = legal_worlds(self.global_batch, self.micro_batch)
        if self.world not in legal:
            listed = ", ".join(map(str, legal))
            raise DataError(
                f"world size: global_batch {self.global_batch} in micro-batches of {self.micro_batch}:"
                f" expected one of {listed}, found {self.world}"
            )
        if not 0 <= self.rank < self.world or self.workers < 0 or self.steps < 0:
            raise DataError(
                f"stream: expected rank 0 to {self.world - 1}, workers and steps of at least 0, found {self}"
            )

    @property
    def slots(self) -> range:
        """The slots this rank owns."""
        own = self.global_batch // self.world
        return range(self.rank * own, (self.rank + 1) * own)


def legal_worlds(global_batch: int, micro_batch: int) -> list[int]:
    """World sizes that share out whole micro-batches evenly."""
    micro_batches = global_batch // micro_batch
    return [world for world in range(1, micro_batches + 1) if micro_batches % world == 0]


@dataclass(frozen=True)
class BadSamplePolicy:
    """How many unreadable samples a rank puts up with: in a row, and of all it has seen beyond a few."""

    max_consecutive: int = 16
    max_fraction: float = 0.001
    grace: int = 8


@dataclass
class MicroBatch:
    """What one forward and backward pass takes.

    `window_weight` sums the loss weights of this rank's whole window (all micro-batches of one optimizer step), `state`
    is that of this rank's slots after the window, `skipped` the (key, reason) of samples replaced by blanks. `slots`
    says of each id whose it is; in a pack several samples are of one slot.
    """

    batch: Batch
    step: int
    ids: list[str]
    slots: list[int]
    window_weight: float
    last_in_window: bool
    state: State
    skipped: list[tuple[str, str]] = field(default_factory=list)


Prepare = Callable[[Sample, Draw], Example]
Collate = Callable[[list[Example]], Batch]


class Packing(NamedTuple):
    """That samples are packed: how, and what tells a sample's size (picklable)."""

    config: PackConfig
    measure: Measure


class SampleStream:
    """Iterates over the micro-batches that remain, from `start_step` and `state` to the end of the run.

    Args:
        stores: the sources of the mixture, with their relative `weights`.
        prepare: sample -> example; what it raises as DataError or OSError makes the sample a skip. Picklable.
        collate: examples -> batch. Picklable.
        state: what `merge_states` made of all ranks' states; None starts at the beginning.
        start_step: the number of the first window, as counted in `MicroBatch.step`.
        pad_id: the token of a blank example.
        packing: packs instead of samples.
        repeat: the weights say how often each source is read in a round; see `vlm.data.order`.

    Raises:
        DataError: a state of another global batch, order or data; too many bad samples (while iterating).
    """

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        config: StreamConfig,
        prepare: Prepare,
        collate: Collate,
        state: State | None = None,
        start_step: int = 0,
        tolerance: BadSamplePolicy | None = None,
        pad_id: int = 0,
        shuffle: Shuffle = "full",
        packing: Packing | None = None,
        repeat: bool = False,
    ):
        self.config, self.start_step = config, start_step
        self.tolerance = tolerance or BadSamplePolicy()
        shard_sizes = [store.manifest.shard_sizes for store in stores]
        order = Order([len(store) for store in stores], weights, config.seed, shuffle, shard_sizes, repeat)
        identity = order_identity(stores, weights, config.seed, shuffle, packing.config if packing else None, repeat)
        slots = _start_slots(config, identity, state)
        self._windows = _Windows(stores, order, config, prepare, collate, identity, slots, start_step, pad_id, packing)

    def __len__(self) -> int:
        return len(self._windows) * (len(self.config.slots) // self.config.micro_batch)

    def __iter__(self) -> Iterator[MicroBatch]:
        watch = _SkipWatch(self.tolerance)
        for window in self._loader():
            if isinstance(window, DataError):
                raise window
            for micro_batch in window:
                watch.see(micro_batch)
            yield from window

    def _loader(self) -> Iterable[list[MicroBatch] | DataError]:
        workers = self.config.workers
        if not workers:  # a DataLoader would only add its bookkeeping
            return (self._windows[window] for window in range(len(self._windows)))
        return DataLoader(
            self._windows,
            batch_size=None,
            num_workers=workers,
            # forked workers start at once; spawned ones import torch first, which takes seconds
            multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
            worker_init_fn=_start_worker,
        )


def order_identity(
    stores: Sequence[Store],
    weights: Sequence[float],
    seed: int,
    shuffle: Shuffle,
    pack: PackConfig | None = None,
    repeat: bool = False,
) -> str:
    """A short hash of all that the order depends on; states of another order are refused."""
    parts = ([store.manifest.hash for store in stores], list(map(float, weights)), seed, shuffle)
    parts = (*parts, *([astuple(pack)] if pack else []), *(["repeat"] if repeat else []))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def merge_states(states: Sequence[State]) -> State:
    """One state of all slots from the states of all ranks.

    Raises:
        DataError: slots missing, given twice with different positions, or states of different orders.
    """
    merged: dict[str, dict[str, Any]] = {}
    for state in states:
        for slot, value in state["slots"].items():
            if merged.setdefault(slot, value) != value:
                raise DataError(f"state: slot {slot}: expected one position, found {merged[slot]} and {value}")
    orders = sorted({state["order"] for state in states})
    if len(orders) != 1 or sorted(map(int, merged)) != list(range(len(merged))):
        raise DataError(f"state: expected all slots of one order, found {len(merged)} slots of orders {orders}")
    slots = {str(slot): merged[str(slot)] for slot in range(len(merged))}
    return {"version": STATE_VERSION, "order": orders[0], "slots": slots}


def step_ids(parts: Iterable[tuple[Sequence[int], Sequence[str]]]) -> list[str]:
    """The sample ids of one global step in slot order, from the (slots, ids) of all its micro-batches on all ranks."""
    pairs = [pair for slots, ids in parts for pair in zip(slots, ids, strict=True)]
    return [name for _, name in sorted(pairs, key=lambda pair: pair[0])]  # stable: a pack's samples stay in order


def sizes_of(
    stores: Sequence[Store], weights: Sequence[float], seed: int, packing: Packing, count: int, repeat: bool = False
) -> list[tuple[int, int]]:
    """Tokens and patches of the first samples in the order, as packing sees them."""
    order = Order([len(store) for store in stores], weights, seed, repeat=repeat)
    config = StreamConfig(1, 1, 1, 0, 0, seed, 0)
    windows = _Windows(stores, order, config, _unused, _unused, "", {}, 0, 0, packing)
    return [windows.room(position) for position in range(min(count, sum(map(len, stores))))]


def _unused(*_: Any) -> Any:
    raise NotImplementedError  # sizes alone are asked for


def _start_slots(config: StreamConfig, identity: str, state: State | None) -> dict[int, dict[str, Any]]:
    """The state of each slot of this rank: its next position, and with packing what waits."""
    if state is None:
        return {slot: {"position": slot} for slot in config.slots}
    if state.get("version") != STATE_VERSION:
        raise DataError(f"state: expected version {STATE_VERSION}, found {state.get('version')!r}")
    if len(state["slots"]) != config.global_batch:
        expected, found = config.global_batch, len(state["slots"])
        raise DataError(f"state: expected {expected} slots, one per sample of global_batch, found {found}")
    if state["order"] != identity:
        raise DataError(
            f"state: expected order {identity} (data, weights, seed, shuffle, packing), found {state['order']}:"
            " it was saved over other data"
        )
    return {slot: state["slots"][str(slot)] for slot in config.slots}


class _Windows(Dataset):
    """The windows of one rank by number; a worker can make any of them without knowing the others."""

    def __init__(
        self,
        stores: Sequence[Store],
        order: Order,
        config: StreamConfig,
        prepare: Prepare,
        collate: Collate,
        identity: str,
        slots: dict[int, dict[str, Any]],
        start_step: int,
        pad_id: int,
        packing: Packing | None,
    ):
        self.stores, self.order, self.config = stores, order, config
        self.prepare, self.collate = prepare, collate
        self.identity, self.slots, self.start_step, self.pad_id = identity, slots, start_step, pad_id
        self.packing = packing
        step = config.global_batch
        self._plan = PackPlan(packing.config, self.room, step, slots) if packing else None

    def __len__(self) -> int:
        return max(0, self.config.steps - self.start_step)

    def __getitem__(self, window: int) -> list[MicroBatch] | DataError:
        if not 0 <= window < len(self):
            raise IndexError(window)
        try:
            return self._window(window)
        except DataError as error:  # raised by the reader: a worker's exceptions arrive wrapped in its traceback
            return error

    def _window(self, window: int) -> list[MicroBatch]:
        size, slots = self.config.micro_batch, list(self.config.slots)
        planned = self._straight(window) if self._plan is None else self._plan.at(window)
        parts = [slots[n : n + size] for n in range(0, len(slots), size)]
        micro_batches = [self._micro_batch(window, part, planned) for part in parts]
        total = sum(float(micro_batch.batch.weights.sum()) for micro_batch in micro_batches)
        for micro_batch in micro_batches:
            micro_batch.window_weight = total
        micro_batches[-1].last_in_window = True
        return micro_batches

    def _straight(self, window: int) -> Planned:
        """Without packing every slot takes its next position."""
        step = self.config.global_batch
        next_of = {slot: state["position"] + window * step for slot, state in self.slots.items()}
        after = {str(slot): {"position": position + step} for slot, position in next_of.items()}
        return Planned({slot: [position] for slot, position in next_of.items()}, after)

    def _micro_batch(self, window: int, slots: list[int], planned: Planned) -> MicroBatch:
        skipped: list[tuple[str, str]] = []
        owners = [slot for slot in slots for _ in planned.positions[slot]]
        examples = [self._example(position, skipped) for slot in slots for position in planned.positions[slot]]
        batch = self.collate(examples)
        if self.packing is not None:
            batch.pack = torch.tensor([slots.index(owner) for owner in owners])
        return MicroBatch(
            batch=batch,
            step=self.start_step + window,
            ids=[example.key for example in examples],
            slots=owners,
            window_weight=0.0,
            last_in_window=False,
            state={"version": STATE_VERSION, "order": self.identity, "slots": planned.state},
            skipped=skipped,
        )

    def _example(self, position: int, skipped: list[tuple[str, str]]) -> Example:
        place = self.order.at(position)
        store = self.stores[place.source]
        try:
            size = self._size(position)
            example = self.prepare(store.read(place.number), Draw(position, place.epoch, self.config.seed))
        except (DataError, OSError) as error:
            key = store.key(place.number)
            skipped.append((key, str(error)))
            return blank_example(self.pad_id, key, position)
        if size is not None and len(example.tokens) != size.length:
            raise DataError(
                f"sample {example.key}: pack: expected the {size.length} tokens that its text and the size of its"
                f" images told, found {len(example.tokens)}; if the images are others than the index says,"
                " run `vlm data index`"
            )
        return example

    def _size(self, position: int) -> Size | None:
        """What the sample at a position takes up; None without packing.

        Raises:
            DataError: it cannot be read, or no pack has room for it.
            OSError: the place it lies at cannot be read.
        """
        if self.packing is None:
            return None
        place = self.order.at(position)
        store = self.stores[place.source]
        row, sample = store.row(place.number), store.record(place.number)
        shown = [(medium.width, medium.height) for medium in row.media]
        if (0, 0) in shown:
            raise DataError(f"sample {row.key}: image: expected a size, found a file that cannot be read")
        size = self.packing.measure(sample, shown, Draw(position, place.epoch, self.config.seed))
        return self.packing.config.check(row.key, size)

    def room(self, position: int) -> tuple[int, int]:
        """Tokens and patches of the sample at a position: of a blank where it will be one."""
        try:
            size = self._size(position)
        except (DataError, OSError):
            return 1, 0
        assert size is not None, "asked with packing only"
        return size.tokens, size.patches


class _SkipWatch:
    """Logs skipped samples of a rank and stops the run when there are too many."""

    def __init__(self, policy: BadSamplePolicy):
        self.policy = policy
        self.seen = 0
        self.row: list[str] = []
        self.keys: deque[str] = deque(maxlen=policy.grace + policy.max_consecutive)
        self.count = 0

    def see(self, micro_batch: MicroBatch) -> None:
        reasons = dict(micro_batch.skipped)
        for key in micro_batch.ids:
            self.seen += 1
            if key not in reasons:
                self.row = []
                continue
            log.warning("skipped at step %d: %s", micro_batch.step, reasons[key])
            self._count(key, reasons[key])

    def _count(self, key: str, reason: str) -> None:
        self.count += 1
        self.row.append(key)
        self.keys.append(key)
        if len(self.row) > self.policy.max_consecutive:
            keys = ", ".join(self.row)
            most = self.policy.max_consecutive
            raise DataError(f"bad samples: expected at most {most} in a row, found {keys}; the last: {reason}")
        allowed = self.policy.grace + self.policy.max_fraction * self.seen
        if self.count > allowed:
            raise DataError(
                f"bad samples: expected at most {self.policy.max_fraction:.2%} (and {self.policy.grace}),"
                f" found {self.count} of {self.seen}: {', '.join(self.keys)}; the last: {reason}"
            )


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns in forked processes otherwise
