"""What is written while training: metrics, the trace of samples, checkpoints; and what the user sees."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from vlm.data.stream import MicroBatch, step_ids
from vlm.progress import Progress
from vlm.training.checkpoints import Files, newest
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
    """metrics.jsonl and the progress line.

    Every number is of all ranks together since the line before: the loss per token or sample that it is averaged
    over, ``lr`` as the last step used it, samples and tokens per second (tokens: text and placeholders, without
    padding), and how many samples were skipped where some were. data_wait_s is the time per step that the first
    rank stood waiting for its batch.
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
        self.waited, self.windows = 0.0, 0
        self.sums: dict[str, float] = defaultdict(float)
        self.logs: dict[str, float] = defaultdict(float)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: MicroBatch, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.ended
        # Here, because after the step the scheduler has moved on.
        self.lr = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        last: Loss = pl_module.last
        weight = float(last.weight)
        self.sums["loss"] += float(last.value.detach())
        self.sums["weight"] += weight
        self.sums["tokens"] += int(batch.batch.length.sum())
        self.sums["samples"] += len(batch.ids)
        self.sums["skipped"] += len(batch.skipped)
        for key, log in last.logs.items():
            self.logs[key] += weight * float(log)
        if batch.last_in_window:
            self.windows += 1
            done = batch.step + 1
            if done % self.every == 0 or done == self.steps:
                self._write(trainer, batch.step)
            self.progress.update(done, **self.shown)
        self.ended = time.perf_counter()

    def _write(self, trainer: Trainer, step: int) -> None:
        ranks = gather((dict(self.sums), dict(self.logs)))
        sums, logs = (add(of_each) for of_each in zip(*ranks, strict=True))
        seconds, weight = time.perf_counter() - self.since, sums["weight"] or 1.0
        entry: dict[str, Any] = {
            "stage": self.stage,
            "name": self.name,
            "step": step,
            "steps": self.steps,
            "loss": sums["loss"] / weight,
            "lr": self.lr,
            "samples_per_s": sums["samples"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "data_wait_s": self.waited / self.windows,
            "seconds": time.perf_counter() - self.begun,
            **({"skipped": int(sums["skipped"])} if sums["skipped"] else {}),
            **{key: total / weight for key, total in logs.items()},
        }
        if trainer.is_global_zero:
            append_line(self.path, entry)
        self.shown = {"loss": entry["loss"]} | {key: entry[key] for key in logs}
        self._reset()


def add(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of each key over all tables that have it."""
    return {key: sum(table.get(key, 0.0) for table in tables) for key in sorted({k for table in tables for k in table})}


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

    An older one is removed only when a newer one is whole: whatever fails, the last good checkpoint survives.
    """

    def __init__(self, stage: int, name: str, steps: int, folder: Path, every: int, keep: int, files: Files) -> None:
        self.stage, self.name, self.steps = stage, name, steps
        self.folder, self.every, self.keep, self.files = folder, every, keep, files

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
        """Save the state after ``done`` steps. Raises TrainingError, on all ranks, when it cannot be written."""
        path = self.folder / f"stage{self.stage}-{self.name}-step{done:08d}.ckpt"
        trainer.save_checkpoint(path)
        if failure := gather(self.files.failure)[0]:
            last = newest(self.folder)
            left = f"the last good one is {last.path}" if last else "there is none before it"
            raise TrainingError(f"checkpoint {path} could not be written: {failure}; {left}")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(f"stage{self.stage}-*.ckpt"))[: -self.keep]:
                old.unlink()
