"""Requests to remote shards that outlive a bad network: each has a time limit, is tried again, and is checked.

A server may stall in the middle of an answer, reset a connection, or send fewer bytes than were asked for. fsspec hands
the first two through as whatever its driver raises (after five minutes, or never) and does not see the third. Here a
request ends after ``TIMEOUT`` seconds plus the time its bytes take on a slow line, and is made ``TRIES`` times with
growing pauses before one error says what was asked of whom and what came back last. What trying again cannot mend
(no such file, no permission, other answers of 4xx) fails at once.

The environment variables ``VLM_REMOTE_TIMEOUT`` (seconds) and ``VLM_REMOTE_TRIES`` set other limits.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from vlm.data.errors import DataError

log = logging.getLogger(__name__)

TIMEOUT = 30.0
TRIES = 5
SLOWEST = 100_000  # bytes per second of a line that still counts as alive
BLOCK = 4 * 2**20
_PAUSE = 0.5  # seconds before the second try; doubled each time
_MOST_PAUSE = 8.0
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, TypeError)
_PASSING = (408, 425, 429)  # answers of 4xx that mean "later"

T = TypeVar("T")


def read_range(address: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a remote file, all of them.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: every try failed, or the server sends something else than this range.
    """

    def request(seconds: float) -> bytes:
        content = _cat(address, seconds, start=start, end=end)
        if len(content) != end - start:
            ignored = "; does the server know ranges?" if len(content) > end - start else ""
            raise OSError(f"{len(content)} bytes{ignored}")
        return content

    return _tried(address, f"{end - start} bytes at {start}", request, (end - start) / SLOWEST)


def read_all(address: str) -> bytes:
    """All of a remote file, such as an index. Raises as :func:`read_range` does."""
    return _tried(address, "the file", lambda seconds: _cat(address, seconds), byte_size(address) / SLOWEST)


def byte_size(address: str) -> int:
    """Size of a remote file. Raises as :func:`read_range` does, and DataError where the server tells no size."""
    size = _tried(address, "its size", lambda seconds: _call(address, "size", seconds))
    if size is None:
        raise DataError(f"{address}: expected a server that tells the size of a file, found none told")
    return int(size)


def open_file(address: str) -> io.BufferedReader:
    """A seekable file for reading a remote shard from end to end, block by block."""
    return io.BufferedReader(_Ranges(address), BLOCK)


class _Ranges(io.RawIOBase):
    """A remote file whose reads are requests of :func:`read_range`."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address, self.length, self.place = address, byte_size(address), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        end = min(self.place + len(buffer), self.length)
        if end <= self.place:
            return 0
        content = read_range(self.address, self.place, end)
        buffer[: len(content)] = content
        self.place = end
        return len(content)


def _tried(address: str, what: str, request: Callable[[float], T], extra: float = 0.0) -> T:
    """The answer to a request that is given its seconds, made until it comes or the tries are used up."""
    timeout, tries = _limits()
    for number in range(1, tries + 1):
        try:
            return request(timeout + extra)
        except _LASTING:
            raise
        except Exception as error:  # each driver has errors of its own: aiohttp's, botocore's, google's
            found = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, TimeoutError):
                found = f"no answer within {timeout + extra:g} s"
            status = getattr(error, "status", 0)
            if number == tries or (isinstance(status, int) and 400 <= status < 500 and status not in _PASSING):
                raise DataError(f"{address}: expected {what}, found {found} (try {number} of {tries})") from error
            # drawn, so that workers do not all come back at once
            pause = min(_PAUSE * 2 ** (number - 1), _MOST_PAUSE) * random.uniform(0.5, 1)
            log.info("%s: expected %s, found %s; trying again in %.1f s", address, what, found, pause)
            time.sleep(pause)
    raise AssertionError("a try returns or raises")


def _limits() -> tuple[float, int]:
    given = [os.environ.get(name) for name in ("VLM_REMOTE_TIMEOUT", "VLM_REMOTE_TRIES")]
    try:
        timeout, tries = float(given[0] or TIMEOUT), int(given[1] or TRIES)
    except ValueError:
        timeout, tries = 0.0, 0
    if timeout <= 0 or tries < 1:
        raise DataError(f"VLM_REMOTE_TIMEOUT, VLM_REMOTE_TRIES: expected seconds and a count, found {given}")
    return timeout, tries


def _cat(address: str, seconds: float, **span: int) -> bytes:
    return _call(address, "cat_file", seconds, **span)


def _call(address: str, method: str, seconds: float, **arguments: Any) -> Any:
    """A method of the address's file system; where that is asynchronous the request is ended after ``seconds``.

    The others (Hugging Face's) have time limits of their own.
    """
    files, name = fsspec.core.url_to_fs(address)
    if not getattr(files, "async_impl", False):
        return getattr(files, method)(name, **arguments)
    coroutine = getattr(files, f"_{method}")

    async def limited() -> Any:
        try:
            return await asyncio.wait_for(coroutine(name, **arguments), seconds)
        except FileNotFoundError as error:  # to fsspec's http whatever fails while a size is asked for is this
            cause = error.__cause__
            missing = isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)
            if isinstance(cause, Exception) and not missing:
                raise cause from None
            raise

    return sync(files.loop, limited)
