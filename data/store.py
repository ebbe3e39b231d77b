"""Random access to the samples of a manifest: number -> sample, from local files or by range requests.

A store can be pickled and forked: file descriptors belong to the process that opened them, and indexes are read when
their shard is first used.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

from vlm.data import remote
from vlm.data.address import local_path
from vlm.data.errors import DataError
from vlm.data.index import Index, Manifest, Row, load_index
from vlm.data.schema import Sample, joined_sample, parse_record

_OPEN_FILES = 256


class Store:
    """The samples of a data set, numbered in the order of its shards."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._ends = list(accumulate(manifest.shard_sizes))
        self._indexes: dict[int, Index] = {}
        self._files: dict[int, int] = {}
        self._paths: dict[int, str | None] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(number) for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["manifest"])

    def __del__(self) -> None:
        if self._process == os.getpid():
            for file in self._files.values():
                os.close(file)

    def row(self, number: int) -> Row:
        """What the index knows of sample `number`. Raises IndexError outside the data set."""
        return self._locate(number)[1]

    def key(self, number: int) -> str:
        """Key of sample `number`."""
        return self.row(number).key

    def by_key(self, key: str) -> int:
        """The number of a sample. Raises DataError if there is none of that key."""
        if key not in self._numbers:
            raise DataError(f"sample {key}: expected a key of this data set ({len(self)} samples), found none")
        return self._numbers[key]

    def read(self, number: int) -> Sample:
        """Read and parse one sample with one request for all of its members.

        Raises:
            DataError: the sample is unreadable; names its key.
            OSError: the place it lies at is.
        """
        shard, row = self._locate(number)
        if row.problem:
            raise DataError(row.problem)
        start, end = row.offset, row.offset + row.size
        for medium in row.media:
            start, end = min(start, medium.offset), max(end, medium.offset + medium.size)
        content = self._content(row, shard, start, end)
        if len(content) != end - start:
            where = self.manifest.shards[shard].address
            raise DataError(f"sample {row.key}: {where}: expected {end - start} bytes at {start}, found {len(content)}")
        document = content[row.offset - start : row.offset - start + row.size]
        media = [content[medium.offset - start : medium.offset - start + medium.size] for medium in row.media]
        return joined_sample(row.key, document, tuple(media), tuple([medium.ext for medium in row.media]))

    def record(self, number: int) -> Sample:
        """One sample without its media: its text and what it says of them. Raises as :meth:`read` does."""
        shard, row = self._locate(number)
        if row.problem:
            raise DataError(row.problem)
        document = self._content(row, shard, row.offset, row.offset + row.size)
        return parse_record(row.key, document, [medium.size for medium in row.media])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        keys = (row.key for shard in range(len(self._ends)) for row in self._index(shard).rows)
        return {key: number for number, key in enumerate(keys)}

    def _locate(self, number: int) -> tuple[int, Row]:
        if not 0 <= number < len(self):
            raise IndexError(f"expected a sample number below {len(self)}, found {number}")
        shard = bisect_right(self._ends, number)
        start = self._ends[shard - 1] if shard else 0
        return shard, self._index(shard).rows[number - start]

    def _index(self, shard: int) -> Index:
        if shard not in self._indexes:
            listed = self.manifest.shards[shard]
            index = load_index(listed.address)
            if index.sha256 != listed.sha256 or len(index.rows) != listed.count:
                raise DataError(f"{listed.address}: its index and the manifest disagree; run `vlm data index` on it")
            self._indexes[shard] = index
        return self._indexes[shard]

    def _content(self, row: Row, shard: int, start: int, end: int) -> bytes:
        try:
            return self._read_range(shard, start, end)
        except DataError as error:  # of a remote address; it knows no sample
            raise DataError(f"sample {row.key}: {error}") from error

    def _read_range(self, shard: int, start: int, end: int) -> bytes:
        if shard not in self._paths:
            path = local_path(self.manifest.shards[shard].address)
            self._paths[shard] = None if path is None else str(path)
        name = self._paths[shard]
        if name is None:
            return remote.read_range(self.manifest.shards[shard].address, start, end)
        return os.pread(self._file(shard, name), end - start, start)

    def _file(self, shard: int, path: str) -> int:
        if self._process != os.getpid():  # forked: the parent's descriptors stay the parent's
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._files[shard]
