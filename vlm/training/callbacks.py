"""What is written while training: metrics, the trace of samples, checkpoints; and what the user sees."""

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from vlm.data.stream import MicroBatch, step_ids
from vlm.devices import by_driver
from vlm.progress import Progress
from vlm.training.checkpoints import Files, newest
from vlm.training.datamodule import StageData
from vlm.training.errors import TrainingError
from vlm.training.flops import FlopMeter
from vlm.training.loss import Loss
from vlm.training.ranks import gather


def keep_lines_before(path: Path, stage: int, step: int) -> None:
    """Drop the lines of a JSON-lines log that belong to ``stage`` at ``step`` or later: they are written anew.

    A last line cut short by a kill is dropped too. Raises TrainingError where the disk does not take it.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if (entry["stage"], entry["step"]) < (stage, step):
            kept.append(line + "\n")
    fresh = path.with_suffix(".tmp")
    with _written(path):
        fresh.write_text("".join(kept))
        fresh.replace(path)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add a line to a JSON-lines log. Raises TrainingError where the disk does not take it; a part of it that it took
    is dropped when the run goes on."""
    with _written(path), path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path} could not be written: {error.strerror or error}") from None


class Watch(Callback):
    """metrics.jsonl, the progress line and ``run.log``.

    Every number is of all ranks together since the line before: the loss per token or sample that it is averaged
    over, ``lr`` as the last step used it, samples and tokens per second (tokens: text and placeholders, without
    padding), and how many samples were skipped where some were. llm_tokens_per_s are those that enter the language
    model, visual ones after cuts, and padded_tokens_per_s the places that they fill with padding. data_wait_s is the
    time per step that the rank waited for its batch that waited longest. tflops: per device and second, counted by
    :mod:`~vlm.training.flops`; mfu: their share of the GPU's peak in bf16, where the GPU is known. peak_memory_gib: of
    the device that held most since the line before (on a CPU of the process since it began). max_over_mean_flops and
    max_over_mean_time tell how uneven ranks are: in counted work, and in the time of a forward pass (in which ranks
    with sharded weights wait for each other).
    """

    def __init__(
        self,
        stage: int,
        name: str,
        steps: int,
        path: Path,
        every: int,
        progress: Progress,
        logs: Sequence[Callable[[int, dict[str, Any]], None]] = (),
    ) -> None:
        self.stage, self.name, self.steps, self.path, self.every = stage, name, steps, path, every
        self.progress, self.sinks = progress, logs
        self.meter: FlopMeter | None = None
        self.begun = time.perf_counter()
        self.shown: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.meter = FlopMeter(pl_module.model)
        self.clock = ForwardClock(pl_module.device)
        self._reset()
        self.ended = time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.meter is not None:
            self.meter.detach()
            self.meter = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        self.clock.stop()

    def _reset(self) -> None:
        self.since = time.perf_counter()
        self.waited, self.windows = 0.0, 0
        # Of numbers, or of tensors on the device: they are read when a line is written, so that no step waits.
        self.sums: dict[str, Any] = defaultdict(float)
        self.logs: dict[str, Any] = defaultdict(float)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: MicroBatch, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.ended
        # Here, because after the step the scheduler has moved on.
        self.lr = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        self.clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        last: Loss = pl_module.last
        weight = last.weight.detach().double()
        self.sums["loss"] += last.value.detach().double()
        self.sums["weight"] += weight
        self.sums["tokens"] += pl_module.counted[0]
        self.sums["samples"] += len(batch.ids)
        self.sums["skipped"] += len(batch.skipped)
        for key, log in last.logs.items():
            self.logs[key] += weight * log.detach()
        if batch.last_in_window:
            self.windows += 1
            done = batch.step + 1
            if done % self.every == 0 or done == self.steps:
                self._write(trainer, batch.step)
            self.progress.update(done, **self.shown)
        self.ended = time.perf_counter()

    def _write(self, trainer: Trainer, step: int) -> None:
        assert self.meter is not None
        flops, real, padded = self.meter.take()
        own = {"flops": flops, "llm": real, "padded": padded}
        mine = {
            "wait": self.waited / self.windows,
            "time": self.clock.take(),
            "memory": peak_memory(self.clock.device),
            "flops": flops,
        }
        ranks = gather((read(self.sums) | own, read(self.logs), mine))
        sums, logs = (add(of_each) for of_each in list(zip(*ranks, strict=True))[:2])
        seconds, weight = time.perf_counter() - self.since, sums["weight"] or 1.0
        per_device = sums["flops"] / seconds / len(ranks)
        peak = peak_flops(self.clock.device)
        entry: dict[str, Any] = {
            "stage": self.stage,
            "name": self.name,
            "step": step,
            "steps": self.steps,
            "loss": sums["loss"] / weight,
            "lr": self.lr,
            "samples_per_s": sums["samples"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "llm_tokens_per_s": sums["llm"] / seconds,
            "padded_tokens_per_s": sums["padded"] / seconds,
            "data_wait_s": max(rank["wait"] for *_, rank in ranks),
            "tflops": per_device / 1e12,
            **({"mfu": per_device / peak} if peak else {}),
            "grad_norm": trainer.lightning_module.grad_norm,  # type: ignore[union-attr]
            "peak_memory_gib": max(rank["memory"] for *_, rank in ranks),
            **(
                {f"max_over_mean_{key}": uneven([rank[key] for *_, rank in ranks]) for key in ("flops", "time")}
                if len(ranks) > 1
                else {}
            ),
            "seconds": time.perf_counter() - self.begun,
            **({"skipped": int(sums["skipped"])} if sums["skipped"] else {}),
            **{key: total / weight for key, total in logs.items()},
        }
        if trainer.is_global_zero:
            append_line(self.path, entry)
            for log in self.sinks:
                log(step, entry)
        speed = {"MFU": entry["mfu"]} if peak else {"tokens/s": entry["llm_tokens_per_s"]}
        self.shown = {"loss": entry["loss"]} | {key: entry[key] for key in logs} | speed
        self._reset()


def read(table: dict[str, Any]) -> dict[str, float]:
    """Tensors on the device as numbers."""
    return {key: float(value) for key, value in table.items()}


def uneven(values: Sequence[float]) -> float:
    """The largest over the mean: 1 where all ranks have the same."""
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


class ForwardClock:
    """Seconds of forward passes of this rank, on a GPU by its own events: they are read when a line is written."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self.events: list[tuple[Any, Any]] = []
        self.begun: Any = None

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.begun = self._now()

    def stop(self) -> None:
        """At the end of a forward pass; one that is not under way is none."""
        if self.begun is None:
            return
        now = self._now()
        if self.device.type == "cuda":
            self.events.append((self.begun, now))
        else:
            self.seconds += now - self.begun
        self.begun = None

    def take(self) -> float:
        if self.events:
            self.events[-1][1].synchronize()
        seconds = self.seconds + sum(first.elapsed_time(last) for first, last in self.events) / 1000
        self.seconds, self.events = 0.0, []
        return seconds


def peak_memory(device: torch.device) -> float:
    """GiB that were in use at most: on a GPU since this was last asked, on a CPU since the process began."""
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most / 2**30


def peak_flops(device: torch.device) -> float | None:
    """What the device does at most in bf16, where it is known."""
    gpu = by_driver(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak if gpu else None


def add(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of each key over all tables that have it."""
    return {key: sum(table.get(key, 0.0) for table in tables) for key in sorted({k for table in tables for k in table})}


class Trace(Callback):
    """samples.jsonl: the ids of each consumed global batch, in slot order."""

    def __init__(self, stage: int, path: Path) -> None:
        self.stage, self.path = stage, path
        self.window: tuple[list[int], list[str]] = ([], [])  # slots and ids since the last step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        for known, new in zip(self.window, (batch.slots, batch.ids), strict=True):
            known += new
        if not batch.last_in_window:
            return
        ids = step_ids(gather(self.window))
        self.window = ([], [])
        if trainer.is_global_zero:
            append_line(self.path, {"stage": self.stage, "step": batch.step, "ids": ids})


class Save(Callback):
    """A checkpoint every so many steps and at the end of the stage; the newest ``keep`` of the stage stay.

    An older one is removed only when a newer one is whole: whatever fails, the last good checkpoint survives.
    """

    def __init__(self, stage: int, name: str, steps: int, folder: Path, every: int, keep: int, files: Files) -> None:
        self.stage, self.name, self.steps = stage, name, steps
        self.folder, self.every, self.keep, self.files = folder, every, keep, files
        self.pending: Path | None = None  # saved, and not yet known to be whole

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if not batch.last_in_window:
            return
        data: StageData = trainer.datamodule  # type: ignore[attr-defined]
        data.consumed(batch)
        done = batch.step + 1
        if done % self.every == 0 or done == self.steps:
            self.save(trainer, done)

    def save_unless_saved(self, trainer: Trainer, done: int) -> None:
        """Save after ``done`` steps, where it is not a step that is saved anyway."""
        if done % self.every and done != self.steps:
            self.save(trainer, done)

    def save(self, trainer: Trainer, done: int) -> None:
        """Save the state after ``done`` steps. Raises TrainingError, on all ranks, when it cannot be written, or, where
        they are written in the background, the one before it could not."""
        self._finish(trainer)
        self.pending = self.folder / f"stage{self.stage}-{self.name}-step{done:08d}.ckpt"
        trainer.save_checkpoint(self.pending)
        if not self.files.background:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let what is being written become whole; what stopped the run is told, and no other failure."""
        with suppress(Exception):
            self.files.wait()

    def _finish(self, trainer: Trainer) -> None:
        """See the last one to the disk, and only then remove what is too old. Raises TrainingError on all ranks."""
        path, self.pending = self.pending, None
        if path is None:
            return
        self.files.wait()
        if failure := gather(self.files.failure)[0]:
            last = newest(self.folder)
            left = f"the last good one is {last.path}" if last else "there is none before it"
            raise TrainingError(f"checkpoint {path} could not be written: {failure}; {left}")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(f"stage{self.stage}-*.ckpt"))[: -self.keep]:
                old.unlink()
