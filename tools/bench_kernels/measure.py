"""Time and memory of peers that take turns, and whether each is right before it is timed."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = tuple[Tensor, ...]


class Row(NamedTuple):
    """One peer of one case. ``problem`` says why it was not timed; then the figures are empty."""

    case: str
    peer: str
    seconds: list[float]
    megabytes: float
    error: float
    problem: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    case: str,
    peers: Mapping[str, Callable[[], Result]],
    truth: Callable[[], Result] | None,
    tolerance: float,
    repeats: int,
) -> list[Row]:
    """Check every peer against ``truth``, then time them in turns, and read the peak memory of each.

    ``error`` is the largest difference of an output, relative to the largest value of the truth. A peer whose error is
    above ``tolerance`` or that raises is reported and not timed. Peers that compute something else on purpose (plain
    attention as a lower bound) start with ``(`` and are not checked.
    """
    expected = None if truth is None else [x.double() for x in truth()]
    rows: dict[str, Row] = {}
    for name, peer in peers.items():
        rows[name] = _first(case, name, peer, expected, tolerance)
    running = {name: peer for name, peer in peers.items() if not rows[name].problem}
    for _ in range(repeats):
        for name, peer in running.items():
            rows[name].seconds.append(_seconds(peer))
    return list(rows.values())


def _first(case: str, name: str, peer: Callable[[], Result], expected: list[Tensor] | None, tolerance: float) -> Row:
    """The first pass of a peer: compiles and warms up, is compared, and tells its peak memory."""
    try:
        found = peer()
        error = float("nan")
        if expected is not None and not name.startswith("("):
            pairs = zip(found, expected, strict=True)
            error = max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)
        del found
        memory = _megabytes(peer)
    except Exception as problem:  # any reason for which a peer does not run belongs into the table
        return Row(case, name, [], 0.0, 0.0, f"{type(problem).__name__}: {str(problem).splitlines()[0][:110]}")
    if not error <= tolerance and error == error:
        return Row(case, name, [], memory, error, f"wrong: error {error:.1e} is above {tolerance:.0e}")
    return Row(case, name, [], memory, error)


def _seconds(peer: Callable[[], Result]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        peer()
        return time.perf_counter() - start
    _flush()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    peer()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _flush() -> None:
    """Empty the L2 cache (50 MB on an H100, 126 MB on what follows), as a model's other layers would."""
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    torch.cuda.synchronize()


def _megabytes(peer: Callable[[], Result]) -> float:
    """Peak memory that a call takes beyond its inputs, its outputs included; nan where it cannot be told."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        with LiveTensors() as live:
            peer()
    except NotImplementedError:  # FlexAttention does not run under a mode
        return float("nan")
    return live.peak / 2**20


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that still live; ``peak`` is the most at any moment,
    ``largest`` the largest single one. Scratch memory inside an operation is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (ref := StorageWeakRef(x.untyped_storage())) not in given:
                self.live[ref] = x.untyped_storage().nbytes()
                self.largest = max(self.largest, self.live[ref])
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out
