"""LLaVA-style JSON: records of `id`, `image` (a path or a list) and `conversations`, human and gpt turns with marks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vlm.data.errors import DataError
from vlm.data.importers.common import Keys, json_records, read_image, samples
from vlm.data.schema import Message, Part, Sample

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MARK = "<image>"


def read_llava_json(
    annotations: str | Path,
    images: str | Path,
    on_bad: Literal["error", "skip"] = "error",
    source: str = "",
    license: str = "",
) -> Iterator[Sample]:
    """Samples of a `.json` list, or of a `.jsonl` file with a record per line.

    `<image>` marks in human turns become image parts, in the order of `image`; line ends beside a mark go with it, for
    templates write their own. Other fields of a record are kept in `meta`.

    Raises:
        DataError: a record of another shape, marks and images that differ in number, a missing image or one outside
            the folder. With `on_bad="skip"` such records are counted and logged instead.
    """
    keys, folder = Keys(), Path(images)
    records = json_records(Path(annotations))
    yield from samples(annotations, records, on_bad, lambda n, r: _sample(keys, n, r, folder, source, license))


def _sample(keys: Keys, number: int, record: Any, folder: Path, source: str, license: str) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"record {number}: expected an object, found {type(record).__name__}")
    key = keys.make(str(record.get("id", number)))
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"sample {key}: conversations: expected a list of turns, found {turns!r:.60}")
    names = _names(key, record.get("image"))
    messages = _messages(key, turns, len(names))
    media = [read_image(folder, name, key) for name in names]
    return Sample(
        key,
        messages,
        tuple(content for _, content in media),
        tuple(extension for extension, _ in media),
        source=source,
        license=license,
        meta={name: value for name, value in record.items() if name not in ("image", "conversations")},
    )


def _names(key: str, given: object) -> list[str]:
    names = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"sample {key}: image: expected a path or a list of paths, found {given!r:.60}")
    return names


def _messages(key: str, turns: list[Any], images: int) -> tuple[Message, ...]:
    messages: list[Message] = []
    shown = 0
    for number, turn in enumerate(turns):
        where = f"sample {key}: conversations[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{where}: expected from and value, found {turn!r:.60}")
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise DataError(f"{where}.from: expected one of {', '.join(_ROLES)}, found {turn.get('from')!r}")
        parts = _parts(turn["value"], shown) if role == "user" else (Part("text", turn["value"]),)
        shown += sum(part.type == "image" for part in parts)
        messages.append(Message(role, parts))
    if shown != images:
        raise DataError(f"sample {key}: placeholder count mismatch: expected {images} {_MARK} marks, found {shown}")
    return tuple(messages)


def _parts(text: str, shown: int) -> tuple[Part, ...]:
    """Text and images in turn; `shown` images came before."""
    pieces = text.split(_MARK)
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(Part("image", ref=shown + number - 1))
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or not text:
            parts.append(Part("text", piece))
    return tuple(parts)
