"""The Scenes data set on disk: shards, tokenizer, and the files POPE and CHAIR read.

    <folder>/scenes.json                  what it was made from; the same again means nothing to do
    <folder>/train, test, counterfactual  shards (chat sample v1)
    <folder>/tokenizer                    loads with transformers
    <folder>/benchmarks                   pope_{random,popular,adversarial}.json, chair.json (test scenes),
                                          chair_counterfactual.json, synonyms.txt

There is the whole data set or none (:mod:`vlm.data.made`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vlm.data.benchmarks._shared.pope_builder import SPLITS as POPE_SPLITS
from vlm.data.benchmarks._shared.pope_builder import Labelled, build_pope
from vlm.data.errors import DataError
from vlm.data.made import make_folder
from vlm.data.scenes.classes import NAMES
from vlm.data.scenes.records import Batch, make_batch
from vlm.data.scenes.text import save_tokenizer, synonyms_file
from vlm.data.scenes.world import Kind, World
from vlm.data.schema import Sample
from vlm.data.write import write_shards

VERSION = 4  # raise it when the same arguments give other bytes
SCENES_PER_BATCH = 250

Progress = Callable[[int, int], None]


def make(
    folder: str | Path,
    *,
    train: int,
    test: int,
    seed: int,
    world: Kind = "biased",
    records_per_scene: int = 1,
    workers: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make the data set unless it is there already, and return its folder.

    Args:
        train: training records; every `records_per_scene` of them share a picture.
        test: test scenes, and as many counterfactual ones; both have one record (a full caption) each.
        seed: of everything. Training and test scenes are drawn from streams of their own.
        world: "biased", or "uniform" for the control arm (its counterfactual scenes are the biased world's).
        workers: processes that draw and render beside this one, which writes. The bytes do not depend on it.
        progress: called with (records done, records in all) after every batch.

    Raises:
        DataError: impossible arguments, or the folder holds something else than Scenes.
    """
    arguments = {
        "train": train,
        "test": test,
        "seed": seed,
        "world": world,
        "records_per_scene": records_per_scene,
    }
    for name, least in (("train", 1), ("test", 1), ("seed", 0), ("records_per_scene", 1)):
        if arguments[name] < least:
            raise DataError(f"scenes: {name}: expected at least {least}, found {arguments[name]}")
    stamp = {"arguments": arguments, "version": VERSION, "package": version("vlm-recipes"), "classes": list(NAMES)}

    def fill(part: Path) -> None:
        _fill(part, World(world), arguments, workers, _counter(progress, train + 2 * test))

    return make_folder(folder, stamp, "scenes", "Scenes", fill)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that is told how many more records are done."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return count


def _fill(folder: Path, world: World, arguments: dict[str, Any], workers: int, count: Callable[[int], None]) -> None:
    present: dict[str, dict[str, tuple[str, ...]]] = {}
    # spawned, not forked: a process that has used torch holds threads, and a fork of it may hang
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 0 else nullcontext()
    with pool as processes:
        for split, records, per_scene in (
            ("train", arguments["train"], arguments["records_per_scene"]),
            ("test", arguments["test"], 1),
            ("counterfactual", arguments["test"], 1),
        ):
            batches = _batches(world, arguments["seed"], split, records, per_scene)
            present[split] = {}
            made = map(make_batch, batches) if processes is None else _made_ahead(processes, batches, 2 * workers)
            write_shards(_watched(made, present[split], count), folder / split)
    save_tokenizer(folder / "tokenizer")
    _write_benchmarks(folder / "benchmarks", present, arguments["seed"])


def _made_ahead(pool: ProcessPoolExecutor, batches: Iterable[Batch], ahead: int) -> Iterator[list[Sample]]:
    """The batches' samples in order, with a bounded number waiting: the writer may be slower than the workers."""
    waiting: deque[Future[list[Sample]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(make_batch, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(world: World, seed: int, split: str, records: int, per_scene: int) -> Iterator[Batch]:
    scenes = -(-records // per_scene)
    for first in range(0, scenes, SCENES_PER_BATCH):
        yield Batch(world, seed, split, first, min(first + SCENES_PER_BATCH, scenes), per_scene, records)


def _watched(
    batches: Iterable[list[Sample]], present: dict[str, tuple[str, ...]], count: Callable[[int], None]
) -> Iterator[Sample]:
    """The samples one by one, noting what is in each and counting them batch by batch."""
    for batch in batches:
        for sample in batch:
            present[sample.key] = sample.tags
            yield sample
        count(len(batch))


def _write_benchmarks(folder: Path, present: dict[str, dict[str, tuple[str, ...]]], seed: int) -> None:
    folder.mkdir()
    (folder / "synonyms.txt").write_text(synonyms_file(), encoding="utf-8")
    for name, split in (("chair.json", "test"), ("chair_counterfactual.json", "counterfactual")):
        (folder / name).write_text(json.dumps(present[split], indent=0) + "\n", encoding="utf-8")
    images = [Labelled(f"{key}.png", objects) for key, objects in present["test"].items()]
    for split in POPE_SPLITS:
        lines = [json.dumps(record) + "\n" for record in build_pope(images, split, seed=seed)]
        (folder / f"pope_{split}.json").write_text("".join(lines), encoding="utf-8")
