"""Indexes and manifests: what makes a tar readable at random, and a folder of them a data set.

`x.tar` has `x.index.json` beside it: where each sample lies, the sizes of its images, how much text it holds. The
folder has `manifest.json`: its shards with their hashes, counts and totals. Both are rebuilt by `vlm data index`; if
one is missing it is built when first needed and kept where the place can be written.

A sample whose json is unreadable stays in the index with the reason, so that positions do not move; reading it fails.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

from vlm.data.address import byte_size, expand, local_path, open_binary, read_bytes, write_atomic
from vlm.data.decode import image_size
from vlm.data.errors import DataError
from vlm.data.schema import VERSION as SCHEMA
from vlm.data.schema import MediumInfo, Sample, parse_record
from vlm.data.tar import Entry, Member, read_entries

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
_REBUILD = "run `vlm data index` on it"


@dataclass(frozen=True)
class Medium:
    """An image of a sample: its place in the tar, bytes, and its size in pixels (0 where it could not be read)."""

    ext: str
    offset: int
    size: int
    width: int
    height: int


@dataclass(frozen=True)
class Row:
    """One sample of an index. `chars` counts the text of all messages, `turns` the messages."""

    key: str
    offset: int
    size: int
    media: tuple[Medium, ...]
    chars: int
    turns: int
    problem: str = ""


@dataclass(frozen=True)
class Index:
    """All samples of one shard; `bytes` and `sha256` are those of the tar it was made from."""

    bytes: int
    sha256: str
    tags: tuple[str, ...]
    licenses: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest lists it; `address` is absolute or relative to the working directory."""

    address: str
    bytes: int
    sha256: str
    count: int


@dataclass(frozen=True)
class Manifest:
    """A data set: its shards in order, totals, and the vocabularies its samples use."""

    shards: tuple[Shard, ...]
    media: int
    chars: int
    turns: int
    tags: tuple[str, ...]
    licenses: tuple[str, ...]
    writer: str
    schema: int = SCHEMA

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    @cached_property
    def hash(self) -> str:
        """Identity of the content and its order; where the shards lie does not matter."""
        content = json.dumps([self.schema, [(shard.sha256, shard.count) for shard in self.shards]])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(shard.count for shard in self.shards)


def index_address(shard: str) -> str:
    """`x.tar` -> `x.index.json`."""
    return shard.removesuffix(".tar") + ".index.json"


def load_manifest(where: str | Path | Sequence[str | Path]) -> Manifest:
    """The data set in a folder, or of a pattern or a list of shards.

    Raises:
        DataError: a bad shard, or an index or manifest that no longer fits its shards.
    """
    folder = Path(where) if isinstance(where, str | Path) and Path(where).is_dir() else None
    stored = read_bytes(str(folder / MANIFEST)) if folder else None
    if folder and stored is not None:
        return _check_fresh(_parse_manifest(stored, folder), folder)
    shards = expand(where)
    manifest = _manifest([(shard, load_index(shard)) for shard in shards])
    if folder:
        _keep(folder / MANIFEST, _dump_manifest(manifest))
    return manifest


def build_index(paths: str | Path | Iterable[str | Path]) -> Manifest:
    """Index shards anew and write the indexes, and the manifest of each folder that is given.

    Raises:
        DataError: a bad shard, or a key that two shards share.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    built = {shard: _index_of(shard) for shard in expand(given)}
    for shard, index in built.items():
        if path := local_path(index_address(shard)):
            write_atomic(path, _dump_index(index))
    for folder in (Path(path) for path in given if Path(path).is_dir()):
        inside = [(shard, index) for shard, index in built.items() if Path(shard).parent == folder]
        write_atomic(folder / MANIFEST, _dump_manifest(_manifest(inside)))
    return _manifest(list(built.items()))


def load_index(shard: str) -> Index:
    """The stored index of a shard, or one built now. Raises DataError if the stored one is stale or damaged."""
    stored = read_bytes(index_address(shard))
    if stored is None:
        log.info("%s has no index: reading the whole shard once", shard)
        index = _index_of(shard)
        if path := local_path(index_address(shard)):
            _keep(path, _dump_index(index))
        return index
    index = _parse_index(stored, shard)
    _check_size(shard, index.bytes)
    return index


def digest(address: str) -> str:
    """sha256 of a file, in hex."""
    found = hashlib.sha256()
    with open_binary(address) as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _check_size(shard: str, expected: int) -> None:
    found = byte_size(shard)
    if found != expected:
        raise DataError(f"{shard}: stale index: expected {expected} bytes, found {found}; {_REBUILD}")


def _keep(path: Path, content: bytes) -> None:
    try:
        write_atomic(path, content)
    except OSError as error:
        log.info("%s not kept (%s); it is built again next time", path, error)


def _index_of(shard: str) -> Index:
    entries = read_entries(shard)
    tags, licenses, rows = set(), set(), []
    with open_binary(shard) as file:
        for entry in entries:
            row, sample = _row(file, entry)
            rows.append(row)
            if sample:
                tags.update(sample.tags)
                licenses.add(sample.license)
    return Index(byte_size(shard), digest(shard), tuple(sorted(tags)), tuple(sorted(licenses)), tuple(rows))


def _row(file: BinaryIO, entry: Entry) -> tuple[Row, Sample | None]:
    assert entry.json is not None, "read_entries gives whole samples only"
    files = [entry.media[number] for number in range(len(entry.media))]
    row = Row(entry.key, entry.json.offset, entry.json.size, (), 0, 0)
    try:
        sample = parse_record(entry.key, _read(file, entry.json), [member.size for member in files])
    except DataError as error:
        log.warning("%s", error)
        unknown = tuple(Medium(member.ext, member.offset, member.size, 0, 0) for member in files)
        return replace(row, media=unknown, problem=str(error)), None
    media = tuple(_medium(file, member, sample, number) for number, member in enumerate(files))
    chars = sum(len(part.text) for message in sample.messages for part in message.content)
    return replace(row, media=media, chars=chars, turns=len(sample.messages)), sample


def _medium(file: BinaryIO, member: Member, sample: Sample, number: int) -> Medium:
    stated = sample.media_info[number] if sample.media_info else MediumInfo()
    width, height = stated.width, stated.height
    if width is None or height is None:
        width, height = _measured(_read(file, member), sample.key)
    return Medium(member.ext, member.offset, member.size, width, height)


def _measured(content: bytes, key: str) -> tuple[int, int]:
    try:
        return image_size(content, key)
    except DataError as error:
        log.warning("%s", error)
        return 0, 0


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _manifest(shards: Sequence[tuple[str, Index]]) -> Manifest:
    rows = [row for _, index in shards for row in index.rows]
    _check_unique(shards)
    return Manifest(
        tuple(Shard(shard, index.bytes, index.sha256, len(index.rows)) for shard, index in shards),
        media=sum(len(row.media) for row in rows),
        chars=sum(row.chars for row in rows),
        turns=sum(row.turns for row in rows),
        tags=tuple(sorted({tag for _, index in shards for tag in index.tags})),
        licenses=tuple(sorted({name for _, index in shards for name in index.licenses})),
        writer=_writer(),
    )


def _check_unique(shards: Sequence[tuple[str, Index]]) -> None:
    first: dict[str, str] = {}
    for shard, index in shards:
        for row in index.rows:
            if row.key in first:
                raise DataError(f"{shard}: {row.key}: duplicate key: it is in {first[row.key]} too")
            first[row.key] = shard


def _writer() -> str:
    try:
        return f"vlm-recipes {version('vlm-recipes')}"
    except PackageNotFoundError:
        return "vlm-recipes (not installed)"


def _check_fresh(manifest: Manifest, folder: Path) -> Manifest:
    listed = {shard.address for shard in manifest.shards}
    if extra := sorted({str(path) for path in folder.glob("*.tar")} - listed):
        raise DataError(f"{folder / MANIFEST}: stale: {len(extra)} shards not listed, such as {extra[0]}; {_REBUILD}")
    for shard in manifest.shards:
        _check_size(shard.address, shard.bytes)
    return manifest


def _dump_index(index: Index) -> bytes:
    rows = [
        [row.key, row.offset, row.size, [list(astuple(m)) for m in row.media], row.chars, row.turns, row.problem]
        for row in index.rows
    ]
    head = {
        "version": VERSION,
        "bytes": index.bytes,
        "sha256": index.sha256,
        "tags": index.tags,
        "licenses": index.licenses,
        "fields": ["key", "offset", "size", "media: [ext, offset, size, width, height]", "chars", "turns", "problem"],
    }
    return json.dumps({**head, "samples": rows}, separators=(",", ":")).encode()


def _parse_index(content: bytes, shard: str) -> Index:
    try:
        record = json.loads(content)
        if record["version"] != VERSION:
            raise DataError(
                f"{index_address(shard)}: expected version {VERSION}, found {record['version']}; {_REBUILD}"
            )
        rows = tuple(
            Row(key, offset, size, tuple(Medium(*medium) for medium in media), chars, turns, problem)
            for key, offset, size, media, chars, turns, problem in record["samples"]
        )
        return Index(record["bytes"], record["sha256"], tuple(record["tags"]), tuple(record["licenses"]), rows)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{index_address(shard)}: expected an index, found damage ({error!r}); {_REBUILD}") from error


def _dump_manifest(manifest: Manifest) -> bytes:
    """Shards by name alone, so that the folder can move."""
    shards = [
        {"name": Path(shard.address).name, "bytes": shard.bytes, "sha256": shard.sha256, "count": shard.count}
        for shard in manifest.shards
    ]
    record = {
        "version": VERSION,
        "schema": manifest.schema,
        "writer": manifest.writer,
        "hash": manifest.hash,
        "samples": len(manifest),
        "media": manifest.media,
        "chars": manifest.chars,
        "turns": manifest.turns,
        "tags": manifest.tags,
        "licenses": manifest.licenses,
        "shards": shards,
    }
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def _parse_manifest(content: bytes, folder: Path) -> Manifest:
    try:
        record = json.loads(content)
        if (record["version"], record["schema"]) != (VERSION, SCHEMA):
            raise DataError(f"{folder / MANIFEST}: expected version {VERSION}, found {record['version']}; {_REBUILD}")
        shards = tuple(
            Shard(str(folder / Path(item["name"]).name), item["bytes"], item["sha256"], item["count"])
            for item in record["shards"]
        )
        totals = {name: record[name] for name in ("media", "chars", "turns", "writer")}
        return Manifest(shards, tags=tuple(record["tags"]), licenses=tuple(record["licenses"]), **totals)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST}: expected a manifest, found damage ({error!r}); {_REBUILD}") from error
