"""Stock webdataset: the documented pipeline of shards shuffled, a shuffle buffer, batches made in the workers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.readers.common import SHUFFLE_BUFFER, Item, Job, StockLoader, item, together

name = "webdataset"
package = "webdataset"
shuffle = f"shards, then a buffer of {SHUFFLE_BUFFER}"


class _Members:
    """Members of a tar -> item. Picklable."""

    def __init__(self, decode: bool):
        self.decode = decode

    def __call__(self, sample: dict[str, Any]) -> Item:
        image = next(content for field, content in sample.items() if re.fullmatch(r"0\.\w+", field))
        return item(sample["__key__"], image, sample["json"], self.decode)


def convert(shards: Path, folder: Path, per_file: int) -> Path:
    return shards


def loader(
    sources: Sequence[Path | list[str]], weights: Sequence[float], job: Job, state: dict[str, Any] | None = None
) -> StockLoader:
    webdataset = import_module("webdataset")  # its stubs name none of this

    def pipeline(source: Path | list[str]) -> Any:
        urls = [str(path) for path in sorted(source.glob("*.tar"))] if isinstance(source, Path) else source
        dataset = webdataset.WebDataset(
            urls, shardshuffle=len(urls), seed=job.seed, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        return dataset.shuffle(SHUFFLE_BUFFER).map(_Members(job.decode), handler=webdataset.warn_and_continue)

    if len(sources) == 1:
        mixed = pipeline(sources[0])
    else:
        mixed = webdataset.DataPipeline(webdataset.RandomMix([pipeline(source) for source in sources], list(weights)))
    batched = mixed.compose(import_module("webdataset.filters").batched(job.batch, collation_fn=together))
    return StockLoader(webdataset.WebLoader(batched, batch_size=None, num_workers=job.workers))


def remote(base: str, files: Sequence[str], copy: Path, job: Job) -> StockLoader:
    return loader([[f"{base}/{name}" for name in files if name.endswith(".tar")]], [1.0], job)


def merged(states: Sequence[Any]) -> dict[str, Any] | None:
    return states[0]
