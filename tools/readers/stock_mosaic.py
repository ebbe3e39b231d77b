"""mosaicml-streaming: MDS shards made by its `MDSWriter`, read by `StreamingDataset` and `StreamingDataLoader`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module  # not a dependency, so a type checker does not find it
from pathlib import Path
from typing import Any

from tools.readers.common import Columns, Job, StockLoader, shard_samples, together

name = "mosaicml-streaming"
package = "mosaicml-streaming"
shuffle = "shards, and samples in blocks of its py1e (its default)"
SHARD_BYTES = 1 << 26  # its default


def convert(shards: Path, folder: Path, per_file: int) -> Path:
    columns = {"key": "str", "image": "bytes", "json": "bytes"}
    limit = SHARD_BYTES
    if per_file:
        samples = list(shard_samples(shards))
        limit = per_file * sum(len(one["image"]) + len(one["json"]) for one in samples) // len(samples)
    with import_module("streaming").MDSWriter(
        out=str(folder), columns=columns, size_limit=limit, hashes=["sha1"]
    ) as writer:
        for sample in shard_samples(shards):
            writer.write(sample)
    return folder


def loader(
    sources: Sequence[Path], weights: Sequence[float], job: Job, state: dict[str, Any] | None = None
) -> StockLoader:
    if len(sources) == 1:
        return _open(job, state, local=str(sources[0]))
    stream = import_module("streaming").Stream
    shares = [weight / sum(weights) for weight in weights]
    streams = [stream(local=str(source), proportion=share) for source, share in zip(sources, shares, strict=True)]
    return _open(job, state, streams=streams)


def remote(base: str, files: Sequence[str], copy: Path, job: Job) -> StockLoader:
    """Hashes of what is fetched are checked."""
    return _open(job, None, remote=base, local=str(copy), validate_hash="sha1")


def merged(states: Sequence[Any]) -> dict[str, Any]:
    return states[0]


def _open(job: Job, state: dict[str, Any] | None, **where: Any) -> StockLoader:
    streaming = import_module("streaming")
    unpack = Columns(job.decode)

    class Items(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return unpack(super().__getitem__(at))

    dataset = Items(batch_size=job.batch, shuffle=True, shuffle_seed=job.seed, **where)
    made = streaming.StreamingDataLoader(
        dataset, batch_size=job.batch, num_workers=job.workers, collate_fn=together, drop_last=True
    )
    if state is not None:
        made.load_state_dict(state)
    return StockLoader(made)
