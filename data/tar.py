"""What lies where in a shard: one pass over the headers of a plain tar, extracting nothing.

A shard comes from anywhere, so a member must earn its place: a known name, a regular file, inside the archive. The
rules are those of chat-sample v1: `<key>.json`, `<key>.<n>.<ext>`, the members of one sample
side by side.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from vlm.data.address import open_binary
from vlm.data.decode import IMAGE_EXTENSIONS
from vlm.data.errors import DataError
from vlm.data.schema import check_key

BLOCK = 512
JSON_BYTES = 16 * 2**20
MEMBERS = 1024
PICKLES = ("pkl", "pickle", "pth", "pt", "pyd", "npy", "npz", "joblib", "dill")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # the key ends at the first dot of the last part


@dataclass(frozen=True)
class Problem:
    """Something wrong with a sample or a shard: where (shard), which key ("" if none), what."""

    where: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.what}" if self.key else f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Member:
    """Bytes of a shard: extension, offset and size of the content, not of the tar header before it."""

    ext: str
    offset: int
    size: int


@dataclass
class Entry:
    """The members of one sample."""

    key: str
    json: Member | None = None
    media: dict[int, Member] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """Samples in the order of the shard, and every problem met on the way."""

    entries: list[Entry]
    problems: list[Problem]


def read_entries(address: str) -> list[Entry]:
    """The samples of a shard.

    Raises:
        DataError: the first problem of the shard, as `scan` lists them.
    """
    found = scan(address)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise DataError(f"{found.problems[0]}{more}; `vlm data check` lists all")
    return found.entries


def scan(address: str) -> Scan:
    """Samples and problems of a shard; damage to the archive itself ends the walk, the rest is collected."""
    with open_binary(address) as file:
        walk = _Walk(address)
        try:
            for info in _members(file):
                walk.take(info)
            walk.finish()
        except tarfile.TarError as error:
            walk.problem("", f"truncated or damaged tar: {error}")
        except DataError as error:
            walk.problem("", str(error))
        return Scan(list(walk.entries.values()), walk.problems)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Headers of a plain tar. Raises DataError where it is compressed or does not end as a tar must."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"expected a plain tar, found {name}: samples are read at random, unpack it once")
    if size == 0:
        raise DataError("empty shard: expected a tar with samples, found 0 bytes")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
        while (info := tar.next()) is not None:
            vars(tar)["members"].clear()  # tarfile keeps every header it read; a shard has many
            if info.offset_data + info.size > size:
                raise DataError(f"truncated tar: {info.name!r}: expected {info.size} bytes, the file ends before")
            yield info
        _check_end(file, tar.offset)


def _check_end(file: BinaryIO, offset: int) -> None:
    """A tar ends with two blocks of zeros and nothing after them; a cut between two members shows only here."""
    file.seek(offset)
    if file.read(2 * BLOCK) != bytes(2 * BLOCK):
        raise DataError(f"truncated tar: expected the end mark at byte {offset}, found none (cut off or damaged)")
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise DataError(f"expected nothing after the end mark at byte {offset}, found data (two tars in one file?)")


class _Walk:
    """Sorts members into samples and notes what is wrong with them."""

    def __init__(self, address: str):
        self.address = address
        self.entries: dict[str, Entry] = {}
        self.problems: list[Problem] = []
        self.current = ""
        self.refused: set[str] = set()

    def problem(self, key: str, what: str) -> None:
        self.problems.append(Problem(self.address, key, what))

    def take(self, info: tarfile.TarInfo) -> None:
        name = info.name.removeprefix("./")
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            return self.problem(
                "", f"member {info.name!r}: expected a path inside the archive, found one that climbs out"
            )
        if info.isdir():
            return None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
            return self.problem("", f"member {info.name!r}: expected a regular file, found a link, a device or a hole")
        found = _NAME.fullmatch(name)
        if not found:
            return self.problem("", f"member {info.name!r}: expected <key>.json or <key>.<n>.<ext>")
        return self.place(found.group(1), found.group(2), Member("", info.offset_data, info.size))

    def place(self, key: str, rest: str, member: Member) -> None:
        """Put `<key>.<rest>` where it belongs."""
        number, _, ext = rest.rpartition(".")
        ext = ext.lower()
        if wrong := _wrong_name(number, ext):
            self.refused.add(key)
            return self.problem(key, f"member '{key}.{rest}': {wrong}")
        try:
            entry = self.entry(check_key(key))
        except DataError as error:
            self.refused.add(key)
            return self.problem(key, str(error).removeprefix(f"sample {key!r}: "))
        if entry is None:
            return None
        member = Member(ext, member.offset, member.size)
        if ext == "json":
            return self.place_json(entry, member)
        if int(number) in entry.media:
            return self.problem(key, f"duplicate key: medium {number} is there twice")
        entry.media[int(number)] = member
        return None

    def entry(self, key: str) -> Entry | None:
        """The sample being read; None, and a problem, if this key was closed before."""
        if key == self.current:
            return self.entries[key]
        self.current = key
        if key in self.entries:
            self.current = ""
            if key not in self.refused:
                self.problem(key, "duplicate key: expected the members of a sample side by side, found it again later")
            self.refused.add(key)
            return None
        self.entries[key] = Entry(key)
        return self.entries[key]

    def place_json(self, entry: Entry, member: Member) -> None:
        if entry.json is not None:
            self.problem(entry.key, "duplicate key: the json is there twice")
        elif member.size > JSON_BYTES:
            self.problem(entry.key, f"json: expected at most {JSON_BYTES} bytes, found {member.size}")
        else:
            entry.json = member

    def finish(self) -> None:
        for key, entry in self.entries.items():
            if key in self.refused:
                continue
            if entry.json is None:
                self.problem(key, f"expected the member '{key}.json', found only media {sorted(entry.media)}")
            if sorted(entry.media) != list(range(len(entry.media))) or len(entry.media) > MEMBERS:
                self.problem(key, f"media: expected numbers from 0 on without a gap, found {sorted(entry.media)[:9]}")
        if not self.entries and not self.problems:
            self.problem("", "empty shard: expected samples, found none")


def _wrong_name(number: str, ext: str) -> str:
    """What is wrong with `<number>.<ext>` after the key; "" if nothing."""
    if ext in PICKLES:
        return "pickle member: it could run code when read; expected json or an image, nothing was read"
    if ext != "json" and ext not in IMAGE_EXTENSIONS:
        return f"unknown extension: expected json, {', '.join(IMAGE_EXTENSIONS)}, found {ext!r}"
    if ext == "json":
        return "key with a dot: readers would merge samples; replace the dots" if number else ""
    if not number:
        return f"expected a numbered medium such as <key>.0.{ext}"
    if not re.fullmatch(r"0|[1-9][0-9]{0,3}", number):
        return "key with a dot: readers would merge samples; replace the dots"
    return ""
