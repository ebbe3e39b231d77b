"""litdata: chunks made by its `optimize`, read by `StreamingDataset` and `StreamingDataLoader`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module  # not a dependency, so a type checker does not find it
from pathlib import Path
from typing import Any

from tools.readers.common import Columns, Job, StockLoader, shard_samples, together

name = "litdata"
package = "litdata"
shuffle = "chunks, and samples inside a chunk in blocks of 256"
CHUNK = "64MB"  # its documented choice


def convert(shards: Path, folder: Path, per_file: int) -> Path:
    size = {"chunk_size": per_file} if per_file else {"chunk_bytes": CHUNK}
    import_module("litdata").optimize(
        fn=shard_samples, inputs=[shards], output_dir=str(folder), num_workers=1, start_method="fork", **size
    )
    return folder


def loader(
    sources: Sequence[Path | str], weights: Sequence[float], job: Job, state: dict[str, Any] | None = None
) -> StockLoader:
    litdata = import_module("litdata")
    datasets = [
        litdata.StreamingDataset(
            str(source), shuffle=True, drop_last=False, seed=job.seed, transform=Columns(job.decode)
        )
        for source in sources
    ]
    dataset = datasets[0]
    if len(datasets) > 1:
        shares = [weight / sum(weights) for weight in weights]
        dataset = litdata.CombinedStreamingDataset(datasets, seed=job.seed, weights=shares, iterate_over_all=False)
    made = litdata.StreamingDataLoader(dataset, batch_size=job.batch, num_workers=job.workers, collate_fn=together)
    if state is not None:
        made.load_state_dict(state)
    return StockLoader(made)


def remote(base: str, files: Sequence[str], copy: Path, job: Job) -> StockLoader:
    return loader([base], [1.0], job)


def merged(states: Sequence[Any]) -> dict[str, Any]:
    return states[0]
