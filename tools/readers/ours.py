"""The reader of this repository, as a stage of training uses it: stores, the order, `SampleStream`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from tools.readers.common import Job, Payload, picture, together
from vlm.data.batch import Batch, Example
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.schema import Sample
from vlm.data.store import Store
from vlm.data.stream import MicroBatch, SampleStream, StreamConfig, merge_states

name = "ours"
package = "vlm-recipes"
shuffle = "all samples"


@dataclass
class _Read:
    """What stands for an `Example`: the stream asks for its key alone."""

    key: str
    image: Any
    text: str


@dataclass
class _Together:
    """What stands for a `Batch`: the stream asks for its weights alone."""

    payload: Payload
    weights: np.ndarray


class _Prepare:
    def __init__(self, decode: bool):
        self.decode = decode

    def __call__(self, sample: Sample, draw: Draw) -> Example:
        text = "\n".join(part.text for turn in sample.messages for part in turn.content if part.type == "text")
        image = picture(sample.media[0], sample.key) if self.decode else sample.media[0]
        return cast(Example, _Read(sample.key, image, text))


def _collate(examples: list[Example]) -> Batch:
    read = [cast(_Read, example) for example in examples if not isinstance(example, Example)]  # blanks are Examples
    payload = together([(one.key, one.image, one.text) for one in read]) if read else Payload([], [], [])
    return cast(Batch, _Together(payload, np.ones(len(examples))))


class OurLoader:
    """One rank's stream over an epoch, and the state after the last batch taken."""

    def __init__(self, stream: SampleStream, before: dict[str, Any] | None):
        self.stream, self.before, self.skipped = stream, before, 0
        self.last: MicroBatch | None = None

    def __iter__(self) -> Iterator[Payload]:
        for micro in self.stream:
            self.last = micro
            self.skipped += len(micro.skipped)
            yield cast(_Together, micro.batch).payload

    def state(self) -> dict[str, Any] | None:
        return {"step": self.last.step + 1, "slots": self.last.state} if self.last else self.before


def convert(shards: Path, folder: Path, per_file: int) -> Path:
    return shards


def loader(
    sources: Sequence[Path | list[str]], weights: Sequence[float], job: Job, state: dict[str, Any] | None = None
) -> OurLoader:
    stores = [Store(load_manifest(source)) for source in sources]
    total = job.batch * job.world
    config = StreamConfig(
        global_batch=total,
        micro_batch=job.batch,
        world=job.world,
        rank=job.rank,
        workers=job.workers,
        seed=job.seed,
        steps=sum(map(len, stores)) // total,
    )
    slots, step = (state["slots"], state["step"]) if state else (None, 0)
    stream = SampleStream(stores, weights, config, _Prepare(job.decode), _collate, slots, step)
    return OurLoader(stream, state)


def remote(base: str, files: Sequence[str], copy: Path, job: Job) -> OurLoader:
    return loader([[f"{base}/{name}" for name in files if name.endswith(".tar")]], [1.0], job)


def merged(states: Sequence[Any]) -> dict[str, Any]:
    return {"step": states[0]["step"], "slots": merge_states([state["slots"] for state in states])}
