"""What the readers of `tools.bench_data` share: one job, one form of a sample, the same decoding, the same batch.

A sample is (key, image, text) for every reader: the image as encoded bytes or, decoded, as the tensor an encoder takes;
the text of its conversation, parsed from its json in the process that reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlm.data.decode import decode_image
from vlm.data.images import ImageTransform

SIDE = 224
SHUFFLE_BUFFER = 1000  # samples, of readers that shuffle with one

_TRANSFORM = ImageTransform((SIDE, SIDE))

Item = tuple[str, "bytes | Tensor", str]  # key, image, text


class Job(NamedTuple):
    """How to read: samples per batch of one rank, processes beside the consumer, images decoded or not; whose rank."""

    batch: int
    workers: int
    decode: bool
    seed: int = 0
    world: int = 1
    rank: int = 0


class Payload(NamedTuple):
    """A batch as every reader hands it over; images are one tensor [batch, 3, height, width] when decoded."""

    keys: list[str]
    images: list[bytes] | Tensor
    texts: list[str]


class Loader(Protocol):
    """One epoch of batches of one rank."""

    skipped: int  # samples the reader itself reported as unreadable

    def __iter__(self) -> Iterator[Payload]: ...

    def state(self) -> dict[str, Any] | None:
        """What the reader would save after the batch taken last; None where it has nothing to save."""
        ...


class Reader(Protocol):
    """A reader under test."""

    name: str
    package: str  # distribution whose version is shown
    shuffle: str  # how it shuffles, in words

    def convert(self, shards: Path, folder: Path, per_file: int) -> Path:
        """The folder it reads: the shards themselves, or its own format made of them in `folder` (`per_file` samples
        in a file where above 0, else about as many bytes as a shard)."""
        ...

    def loader(
        self,
        sources: Sequence[Path],
        weights: Sequence[float],
        job: Job,
        state: dict[str, Any] | None = None,
    ) -> Loader:
        """Read one source, or mix several by weight, from the start or from a merged state."""
        ...

    def merged(self, states: Sequence[Any]) -> dict[str, Any] | None:
        """What a checkpoint holds of the states of all ranks."""
        ...

    def remote(self, base: str, files: Sequence[str], copy: Path, job: Job) -> Loader:
        """Read the files of its folder from an address; `copy` is an empty folder for a reader that keeps copies."""
        ...


def installed(package: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def picture(content: bytes, key: str) -> Tensor:
    """Pixels [3, SIDE, SIDE] of an encoded image. Raises DataError on a damaged one."""
    return _TRANSFORM(decode_image(content, key))


def item(key: str, image: bytes, document: bytes, decode: bool) -> Item:
    """A sample of a stock reader, from the members of its tar."""
    record = json.loads(document)
    parts = (part for message in record["messages"] for part in message["content"])
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return key, picture(image, key) if decode else image, text


def together(items: Sequence[Item]) -> Payload:
    """Samples as a batch."""
    keys, images, texts = zip(*items, strict=True)
    decoded = isinstance(images[0], Tensor)
    return Payload(list(keys), torch.stack(images) if decoded else list(images), list(texts))


class Columns:
    """(key, image, json) of a sample that a converted format hands over as a dictionary -> item. Picklable."""

    def __init__(self, decode: bool):
        self.decode = decode

    def __call__(self, sample: Mapping[str, Any]) -> Item:
        return item(sample["key"], sample["image"], sample["json"], self.decode)


class StockLoader:
    """An epoch of one rank by a stock loader; what such a loader leaves out it does not tell, so nothing is skipped."""

    def __init__(self, loader: Any):
        self.loader, self.skipped = loader, 0

    def __iter__(self) -> Iterator[Payload]:
        return iter(self.loader)

    def state(self) -> dict[str, Any] | None:
        """What the loader saves of its place; None where it has nothing to save."""
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None


def shard_samples(shards: Path) -> Iterator[dict[str, Any]]:
    """Every sample of a folder of shards as (key, image, json), in order, for converting."""
    webdataset = import_module("webdataset")  # its stubs name none of this

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield {"key": sample["__key__"], "image": sample["0.jpg"], "json": sample["json"]}
