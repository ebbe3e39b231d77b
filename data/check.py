"""Everything that can be wrong with shards, found before training does: `vlm data check PATH...`.

Each shard is walked once, each json parsed, each image decoded, what the json says of its media held against them, and
keys compared across shards. Nothing is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from vlm.data.address import check_address, expand, open_binary, read_bytes
from vlm.data.decode import ImageLimits, decode_image, image_size
from vlm.data.errors import DataError
from vlm.data.index import MANIFEST, digest, index_address, load_index, load_manifest
from vlm.data.pairs import check_pair
from vlm.data.schema import MediumInfo, Sample, parse_sample
from vlm.data.tar import Entry, Member, Problem, scan


def check(paths: str | Path | Iterable[str | Path], limits: ImageLimits | None = None) -> list[Problem]:
    """All problems of shards, folders or patterns of them; an empty list if all is well."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    problems: list[Problem] = []
    first: dict[str, str] = {}
    for path in map(str, given):
        try:
            shards = expand(check_address(path))
        except DataError as error:
            problems.append(Problem(path, "", str(error).removeprefix(f"{path}: ")))
            continue
        for shard in shards:
            problems += _check_shard(shard, limits or ImageLimits(), first)
        problems += _check_manifest(Path(path))
    return problems


def _check_shard(shard: str, limits: ImageLimits, first: dict[str, str]) -> Iterator[Problem]:
    """Problems of one shard; `first` says in which shard a key was met first and grows."""
    try:
        found = scan(shard)
    except DataError as error:
        yield Problem(shard, "", str(error).removeprefix(f"{shard}: "))
        return
    yield from found.problems
    bad = {problem.key for problem in found.problems}
    with open_binary(shard) as file:
        for entry in found.entries:
            if first.setdefault(entry.key, shard) != shard:
                yield Problem(shard, entry.key, f"duplicate key: it is in {first[entry.key]} too")
            if entry.json is not None and entry.key not in bad:
                yield from _check_sample(shard, file, entry, limits)
    if not found.problems and read_bytes(index_address(shard)) is not None:
        yield from _check_index(shard)


def _check_sample(shard: str, file: BinaryIO, entry: Entry, limits: ImageLimits) -> Iterator[Problem]:
    assert entry.json is not None, "the caller passes whole samples"
    try:
        media = {number: (member.ext, _read(file, member)) for number, member in entry.media.items()}
        sample = parse_sample(entry.key, _read(file, entry.json), media)
        if sample.rejected:
            check_pair(sample)
    except DataError as error:
        yield _problem(shard, entry.key, error)
        return
    for number, content in enumerate(sample.media):
        try:
            decode_image(content, entry.key, limits)
            _check_stated(sample, number, content)
        except DataError as error:
            yield _problem(shard, entry.key, error, f"medium {number}: ")


def _check_stated(sample: Sample, number: int, content: bytes) -> None:
    stated = sample.media_info[number] if sample.media_info else MediumInfo()
    width, height = image_size(content, sample.key)
    digest_found = hashlib.sha256(content).hexdigest()
    measured = (("w", stated.width, width), ("h", stated.height, height), ("sha256", stated.sha256, digest_found))
    for name, said, found in measured:
        if said is not None and said != found:
            raise DataError(f"sample {sample.key}: media[{number}].{name}: expected {said}, found {found}")


def _check_index(shard: str) -> Iterator[Problem]:
    try:
        expected = load_index(shard).sha256
    except DataError as error:
        yield Problem(shard, "", str(error).removeprefix(f"{shard}: "))
        return
    found = digest(shard)
    if found != expected:
        yield Problem(shard, "", f"stale index: expected sha256 {expected}, found {found}; run `vlm data index` on it")


def _check_manifest(path: Path) -> Iterator[Problem]:
    if not (path.is_dir() and (path / MANIFEST).exists()):
        return
    try:
        load_manifest(path)
    except DataError as error:
        yield Problem(str(path), "", str(error))


def _problem(shard: str, key: str, error: DataError, where: str = "") -> Problem:
    return Problem(shard, key, where + str(error).removeprefix(f"sample {key}: "))


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
