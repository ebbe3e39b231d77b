"""Where shards lie: addresses that fsspec opens, and nothing that could start a program.

webdataset gives addresses such as `pipe:...` to a shell. Here an address is a local path or one of a few known schemes,
and it is checked before anything is opened.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote

import fsspec

from vlm.data import remote
from vlm.data.errors import DataError

SCHEMES = ("file", "http", "https", "s3", "gs", "gcs", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def check_address(address: str) -> str:
    """The address itself if it is safe to open.

    Raises:
        DataError: an unknown scheme (`pipe:` and the like), chained schemes (`a::b`), or a `|` at either end.
    """
    found = _SCHEME.match(address)
    scheme = found.group(1).lower() if found else ""
    known = not found or (scheme in SCHEMES and address[found.end() :].startswith("//"))
    if not known or "::" in address or address.strip().startswith("|") or address.strip().endswith("|"):
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"address {address!r}: expected a local path or {allowed}; shell pipes are never run")
    return address


def local_path(address: str) -> Path | None:
    """The path of a local address, or None if it is remote."""
    check_address(address)
    if address.lower().startswith("file://"):
        return Path(unquote(address[len("file://") :]))
    return None if _SCHEME.match(address) else Path(address)


def expand(addresses: str | Path | Iterable[str | Path]) -> list[str]:
    """Every shard that folders, globs and numeric ranges (`{000..119}`) stand for, in order, each once.

    Raises:
        DataError: an unsafe address, or one that stands for no file.
    """
    given = [addresses] if isinstance(addresses, str | Path) else addresses
    shards = [shard for address in given for ranged in _ranges(check_address(str(address))) for shard in _match(ranged)]
    return list(dict.fromkeys(shards))


def _ranges(address: str) -> list[str]:
    found = _RANGE.search(address)
    if not found:
        return [address]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [rest for number in numbers for rest in _ranges(address[: found.start()] + number + address[found.end() :])]


def _match(address: str) -> list[str]:
    path = local_path(address)
    if path is None:
        return _match_remote(address)
    if path.is_dir():
        shards = sorted(str(shard) for shard in path.glob("*.tar"))
    elif path.exists():
        shards = [str(path)]
    else:
        shards = sorted(glob.glob(str(path)))  # noqa: PTH207 - pathlib has no glob for absolute patterns
    if not shards:
        raise DataError(f"{address}: expected a shard, a folder of .tar files or a pattern of them, found none")
    return shards


def _match_remote(address: str) -> list[str]:
    if not any(sign in address for sign in "*?["):
        return [address]
    files, _ = fsspec.core.url_to_fs(address)
    shards = sorted(files.unstrip_protocol(str(name)) for name in files.glob(address))
    if not shards:
        raise DataError(f"{address}: expected shards, found none")
    return shards


def open_binary(address: str) -> BinaryIO:
    """A seekable file for reading. Raises DataError if there is no such file."""
    path = local_path(address)
    try:
        return path.open("rb") if path else cast(BinaryIO, remote.open_file(address))
    except FileNotFoundError:
        raise DataError(f"{address}: expected a file, found none") from None


def read_bytes(address: str) -> bytes | None:
    """All of a small file, or None if there is none."""
    path = local_path(address)
    try:
        return path.read_bytes() if path else remote.read_all(address)
    except FileNotFoundError:
        return None


def byte_size(address: str) -> int:
    """Size of a file in bytes. Raises DataError if there is no such file."""
    path = local_path(address)
    try:
        return path.stat().st_size if path else remote.byte_size(address)
    except FileNotFoundError:
        raise DataError(f"{address}: expected a file, found none") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a local file so that nobody ever sees half of it: a temporary file beside it, then a rename."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
