"""What is written while training: metrics, the trace of samples, checkpoints; and what the user sees."""

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from vlm.data.stream import MicroBatch, step_ids
from vlm.progress import Progress
from vlm.training.datamodule import StageData, gather
from vlm.training.errors import TrainingError
from vlm.training.loss import Loss


def keep_lines_before(path: Path, stage: int, step: int) -> None:
    """Drop the lines of a JSON-lines log that belong to ``stage`` at ``step`` or later: they are written anew.

    A last line cut short by a kill is dropped too.
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
    fresh.write_text("".join(kept))
    fresh.replace(path)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


class Watch(Callback):
    """metrics.jsonl, the progress line, and the stop at a loss that is not finite.

    data_wait_s is the time per step that training stood waiting for its batch; samples_per_s and tokens_per_s
    count what all ranks consumed (tokens: text tokens and placeholders, without padding).
    """

    def __init__(self, stage: int, name: str, steps: int, path: Path, every: int, progress: Progress) -> None:
        self.stage, self.name, self.steps, self.path, self.every = stage, name, steps, path, every
        self.progress = progress
        self.begun = time.perf_counter()
        self.shown: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._reset()
        self.ended = time.perf_counter()

    def _reset(self) -> None:
        self.since = time.perf_counter()
        self.loss = self.weight = self.waited = 0.0
        self.count = self.tokens = self.samples = 0
        self.logs: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: MicroBatch, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        last: Loss = pl_module.last
        value = float(last.value.detach())
        if value != value or value in (float("inf"), float("-inf")):
            keys = ", ".join(batch.batch.keys[:8])
            raise TrainingError(f"stage {self.name}, step {batch.step}: the loss is {value}; samples: {keys}")
        self.loss += value
        self.weight += float(last.weight.detach())
        self.tokens += int(batch.batch.length.sum())
        self.samples += len(batch.ids)
        self.count += 1
        for key, log in last.logs.items():
            self.logs[key] = self.logs.get(key, 0.0) + float(log)
        done = batch.step + 1
        if batch.last_in_window and (done % self.every == 0 or done == self.steps):
            self._write(trainer, batch.step)
        if batch.last_in_window:
            self.progress.update(done, **self.shown)
        self.ended = time.perf_counter()

    def _write(self, trainer: Trainer, step: int) -> None:
        seconds = time.perf_counter() - self.since
        steps = self.count / trainer.accumulate_grad_batches
        world = trainer.world_size
        entry: dict[str, Any] = {
            "stage": self.stage,
            "name": self.name,
            "step": step,
            "steps": self.steps,
            "loss": self.loss / self.weight if self.weight else 0.0,
            "lr": {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups},
            "samples_per_s": self.samples * world / seconds,
            "tokens_per_s": self.tokens * world / seconds,
            "data_wait_s": self.waited / steps,
            "seconds": time.perf_counter() - self.begun,
            **{key: total / self.count for key, total in self.logs.items()},
        }
        if trainer.is_global_zero:
            append_line(self.path, entry)
        self.shown = {"loss": entry["loss"]} | {key: entry[key] for key in self.logs}
        self._reset()


class Trace(Callback):
    """samples.jsonl: the ids of each consumed global batch, in slot order."""

    def __init__(self, stage: int, path: Path) -> None:
        self.stage, self.path = stage, path
        self.window: dict[int, str] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        self.window |= dict(zip(batch.slots, batch.ids, strict=True))
        if not batch.last_in_window:
            return
        ids = step_ids((list(part), list(part.values())) for part in gather(self.window))
        self.window = {}
        if trainer.is_global_zero:
            append_line(self.path, {"stage": self.stage, "step": batch.step, "ids": ids})


class Save(Callback):
    """A checkpoint every so many steps and at the end of the stage; the newest ``keep`` of the stage stay.

    Written beside and then renamed, and an older one is removed only afterwards: whatever fails, the last good
    checkpoint survives.
    """

    def __init__(self, stage: int, name: str, steps: int, folder: Path, every: int, keep: int) -> None:
        self.stage, self.name, self.steps, self.folder, self.every, self.keep = stage, name, steps, folder, every, keep

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

    def save(self, trainer: Trainer, done: int) -> None:
        """Save the state after ``done`` steps. Raises TrainingError when it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"stage{self.stage}-{self.name}-step{done:08d}.ckpt"
        fresh = path.with_suffix(".partial")
        try:
            trainer.save_checkpoint(fresh)
            if trainer.is_global_zero:
                fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            last = max(self.folder.glob("*.ckpt"), default=None)
            left = f"the last good one is {last}" if last else "there is none before it"
            raise TrainingError(f"checkpoint {path} could not be written: {error.strerror or error}; {left}") from None
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(f"stage{self.stage}-*.ckpt"))[: -self.keep]:
                old.unlink()


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of ``folder`` (or of its nearest parent that exists)."""
    existing: Iterable[Path] = (place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(next(iter(existing))).free
