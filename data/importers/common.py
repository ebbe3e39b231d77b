"""What importers share: records of a file and what becomes of bad ones, keys that shards can hold, and images that stay
inside their folder."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlm.data.decode import image_extension
from vlm.data.errors import DataError
from vlm.data.schema import KEY_BYTES, Sample

log = logging.getLogger(__name__)

_HASH = 10


def json_records(path: Path) -> Iterator[Any]:
    """The records of a `.json` list, or of a `.jsonl` file with one per line. Raises DataError for any other."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a file, found none") from None
    except ValueError as error:
        raise DataError(f"{path}: expected utf-8 json, found {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records, found {type(records).__name__}")
    yield from records


def samples(
    annotations: str | Path,
    records: Iterable[Any],
    on_bad: Literal["error", "skip"],
    make: Callable[[int, Any], Sample],
) -> Iterator[Sample]:
    """`make(number, record)` of each record; with `on_bad="skip"` those that it refuses are counted and logged."""
    skipped = 0
    for number, record in enumerate(records):
        try:
            yield make(number, record)
        except DataError as error:
            if on_bad == "error":
                raise
            skipped += 1
            log.warning("%s record %d skipped: %s", annotations, number, error)
    if skipped:
        log.warning("%s: %d records skipped", annotations, skipped)


class Keys:
    """Makes a legal key of any id, each only once; the same ids in the same order give the same keys."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def make(self, given: str) -> str:
        """The id itself where it can be a key; else signs replaced by _ and a hash of the id put behind."""
        clean = re.sub(r"[^A-Za-z0-9_/-]", "_", given)
        clean = re.sub(r"/(?=/|$)|^/", "_", clean) or "_"
        key = clean if clean == given and len(clean) <= KEY_BYTES else _marked(clean, given)
        repeat = 0
        while key in self._seen:
            repeat += 1
            key = _marked(clean, f"{given}\0{repeat}")
        self._seen.add(key)
        return key


def _marked(clean: str, source: str) -> str:
    mark = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH]
    return f"{clean[: KEY_BYTES - _HASH - 1].rstrip('/')}-{mark}"


def read_image(folder: Path, name: str, key: str) -> tuple[str, bytes]:
    """(extension by content, bytes) of an image below `folder`.

    Links in it are the user's own and are followed.

    Raises:
        DataError: a path that leaves the folder, no such file, or no image.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(f"sample {key}: image: expected a path inside the image folder, found {name!r}")
    try:
        content = (folder / path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"sample {key}: image: expected the file {folder / path}, found none") from None
    return image_extension(content, key), content
