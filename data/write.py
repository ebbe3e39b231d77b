"""Write samples into shards that any WebDataset reader can read: plain tars, media first, then the json of each sample.

Everything is written under temporary names and renamed at the end, so a folder never holds half a data set, and the
same samples give the same bytes (no time stamps).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from webdataset.writer import ShardWriter

from vlm.data.errors import DataError
from vlm.data.index import Manifest, build_index
from vlm.data.schema import Sample, dump_sample

SHARD_BYTES = 512 * 2**20
SHARD_SAMPLES = 10_000


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    prefix: str = "shard",
    max_bytes: int = SHARD_BYTES,
    max_count: int = SHARD_SAMPLES,
) -> Manifest:
    """Write `<prefix>-000000.tar` ... with indexes and manifest into a folder that holds no shards yet.

    A shard is closed when it reached `max_count` samples or `max_bytes` of content, whichever is first.

    Raises:
        DataError: a bad sample, a key given twice, no sample at all, or a folder that holds shards already.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
        raise DataError(f"shard prefix: expected letters, digits, _ and -, found {prefix!r}")
    if found := sorted(folder.glob("*.tar")):
        raise DataError(
            f"{folder}: expected a folder without shards, found {found[0].name}; remove it or choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    parts = _Parts(folder)
    try:
        count = _write(samples, parts, prefix, max_bytes, max_count)
        if not count:
            raise DataError(f"{folder}: expected samples to write, found none")
        parts.publish()
    finally:
        parts.discard()
    return build_index(folder)


def _write(samples: Iterable[Sample], parts: _Parts, prefix: str, max_bytes: int, max_count: int) -> int:
    seen: set[str] = set()
    with ShardWriter(
        f"{prefix}-%06d.tar",
        maxcount=max_count,
        maxsize=max_bytes,
        verbose=0,
        opener=parts.open,
        encoder=False,
        mtime=0,
        format="PAX_FORMAT",  # its default, ustar, cannot hold keys longer than 100 characters
    ) as writer:
        for sample in samples:
            if sample.key in seen:
                raise DataError(f"sample {sample.key}: duplicate key: expected each key once, found it again")
            seen.add(sample.key)
            writer.write(_members(sample))
    return len(seen)


def _members(sample: Sample) -> dict[str, bytes | str]:
    media = {f"{n}.{ext}": content for n, (ext, content) in enumerate(zip(sample.media_ext, sample.media, strict=True))}
    return {"__key__": sample.key, "json": dump_sample(sample), **media}


class _Parts:
    """The shards being written, under temporary names until all are whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[Path, BinaryIO] = {}

    def open(self, name: str) -> BinaryIO:
        final = self.folder / name
        self.files[final] = self._part(final).open("wb")
        return self.files[final]

    def publish(self) -> None:
        for final, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._part(final).replace(final)

    def discard(self) -> None:
        for final, file in self.files.items():
            file.close()
            self._part(final).unlink(missing_ok=True)

    def _part(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.{os.getpid()}.part")
