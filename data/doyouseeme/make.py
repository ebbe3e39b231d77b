"""The seven tasks of "Do You See Me" in the plane, re-rendered with a seed (Kanade and Ganu 2025, arXiv:2506.02022).

<folder>/doyouseeme.json              what it was made from; the same again means nothing to do
<folder>/<task>/0.png ...             the pictures, 400 by 400
<folder>/<task>/dataset_info.csv      filename, question (where it has one), answer, sweep, as the original has it
<folder>/<task>/specs.jsonl           what each picture shows, from which it can be drawn again
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.benchmarks._shared.files import one_of
from vlm.data.doyouseeme.tasks import TASKS, Task
from vlm.data.errors import DataError
from vlm.data.made import make_folder

VERSION = 1  # raise it when the same arguments give other pictures


def make(
    folder: str | Path,
    *,
    seed: int,
    tasks: Sequence[str] | None = None,
    repeats: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make the pictures, questions and answers of "Do You See Me" unless they are there already; return the folder.

    Args:
        seed: of everything; every picture has a stream of its own, whatever else is made.
        tasks: names of the tasks; all seven when null.
        repeats: pictures per setting of a sweep; the original's number (1, 5 or 10) when null, 1263 pictures in all.
        progress: called with (pictures done, pictures in all) after every picture.

    Raises:
        DataError: impossible arguments, or the folder holds something else.
    """
    chosen = [TASKS[one_of(name, TASKS, "doyouseeme: task")] for name in (TASKS if tasks is None else tasks)]
    if seed < 0:
        raise DataError(f"doyouseeme: seed: expected at least 0, found {seed}")
    if repeats is not None and repeats < 1:
        raise DataError(f"doyouseeme: repeats: expected at least 1 or null, found {repeats}")
    if not chosen:
        raise DataError(f"doyouseeme: tasks: expected some of {', '.join(TASKS)}, found none")
    stamp = {"seed": seed, "tasks": [task.name for task in chosen], "repeats": repeats, "version": VERSION}
    total = sum(len(list(task.settings(repeats))) for task in chosen)

    def fill(part: Path) -> None:
        done = 0
        for task in chosen:
            for _ in _write(part / task.name, task, seed, repeats):
                done += 1
                if progress is not None:
                    progress(done, total)

    return make_folder(folder, stamp, "doyouseeme", "Do You See Me", fill)


def spec_of(task: Task, seed: int, number: int, repeat: int) -> dict[str, Any]:
    """What a picture shows: of one setting of the sweep, and of one repeat in it."""
    stream = np.random.SeedSequence([seed, list(TASKS).index(task.name), number, repeat])
    return task.draw(np.random.Generator(np.random.PCG64(stream)), task.sweep[number])


def _write(folder: Path, task: Task, seed: int, repeats: int | None) -> Any:
    """Write a task's folder, yielding after every picture."""
    folder.mkdir()
    columns = ["filename", "question", "answer", "sweep"] if task.has_question else ["filename", "answer", "sweep"]
    with (
        (folder / "dataset_info.csv").open("w", encoding="utf-8", newline="") as table,
        (folder / "specs.jsonl").open("w", encoding="utf-8") as specs,
    ):
        rows = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for place, (number, repeat, setting) in enumerate(task.settings(repeats)):
            spec, name = spec_of(task, seed, number, repeat), f"{place}.png"
            task.render(spec).save(folder / name, format="PNG", compress_level=6)
            for question, answer in task.ask(spec):
                rows.writerow({"filename": name, "question": question, "answer": answer, "sweep": str(setting)})
            specs.write(json.dumps({"filename": name, **spec}) + "\n")
            yield
