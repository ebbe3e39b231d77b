"""One sample of a shard: chat messages whose images are placed by reference ("chat sample v1").

Parsing is strict: an unknown field, a wrong type, an image without a medium or a medium that no message shows is an
error that names the sample, the field, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vlm.data.decode import image_size
from vlm.data.errors import DataError

VERSION = 1
ROLES = ("system", "user", "assistant", "tool")
KEY_BYTES = 200
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_FIELDS = ("v", "messages", "media", "source", "license", "tags", "answer", "rejected", "meta")
_MEDIUM_FIELDS = ("w", "h", "bytes", "sha256")


@dataclass(frozen=True)
class Part:
    """A piece of a message: text, or the place of medium number `ref`."""

    type: Literal["text", "image"]
    text: str = ""
    ref: int = -1


@dataclass(frozen=True)
class Message:
    """One turn. `loss` and `weight` speak of assistant turns: whether, and how much, its tokens are learned."""

    role: str
    content: tuple[Part, ...]
    loss: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class MediumInfo:
    """What the json says about a medium; None where it says nothing. Sizes in pixels and bytes."""

    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Sample:
    """Messages with their media as encoded files, in the order that `Part.ref` counts.

    `rejected` holds answers to avoid in place of the last turn, one message each, which makes a preference pair of the
    sample (`vlm.data.pairs`); `answer` a verifiable answer, `meta` any json.
    """

    key: str
    messages: tuple[Message, ...]
    media: tuple[bytes, ...] = ()
    media_ext: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    source: str = ""
    license: str = ""
    answer: str | float | bool | None = None
    rejected: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    media_info: tuple[MediumInfo, ...] = ()


def check_key(key: str) -> str:
    """The key itself if it is legal: letters, digits, _ - and inner /, no dot (readers merge dotted keys)."""
    if not _KEY.fullmatch(key) or len(key) > KEY_BYTES:
        what = "a dot" if "." in key else f"{len(key)} characters" if len(key) > KEY_BYTES else "other characters"
        raise DataError(f"sample {key[:KEY_BYTES]!r}: key: expected letters, digits, _ - /, found {what}")
    return key


def parse_sample(key: str, json_bytes: bytes, media: Mapping[int, tuple[str, bytes]]) -> Sample:
    """Build a sample from its members: the json, and number -> (extension, file content) of each medium.

    Raises:
        DataError: naming the key, the field, what was expected and what was found.
    """
    if sorted(media) != list(range(len(media))):
        raise DataError(f"sample {key}: media: expected numbers 0 to {len(media) - 1}, found {sorted(media)}")
    files = [media[number] for number in range(len(media))]
    return joined_sample(key, json_bytes, tuple(content for _, content in files), tuple(ext for ext, _ in files))


def joined_sample(key: str, json_bytes: bytes, media: tuple[bytes, ...], media_ext: tuple[str, ...]) -> Sample:
    """:func:`parse_sample` of media that are in order already."""
    sample = parse_record(key, json_bytes, [len(content) for content in media])
    return replace(sample, media=media, media_ext=media_ext)


def parse_record(key: str, json_bytes: bytes, sizes: Sequence[int]) -> Sample:
    """The sample without its media, checked against their sizes in bytes. Raises DataError."""
    reader = _Reader(check_key(key))
    record = reader.document(json_bytes)
    reader.fields("", record, _FIELDS, required=("v", "messages"))
    if record["v"] != VERSION or isinstance(record["v"], bool):
        raise reader.error("v", f"{VERSION}", record["v"])
    messages = reader.messages("messages", record["messages"], ROLES)
    rejected = reader.messages("rejected", record.get("rejected", []), ("assistant",), least=0)
    sample = Sample(
        key,
        messages,
        tags=tuple(reader.text(f"tags[{n}]", tag) for n, tag in enumerate(reader.typed("tags", record, list, []))),
        source=reader.text("source", record.get("source", "")),
        license=reader.text("license", record.get("license", "")),
        answer=reader.answer(record.get("answer")),
        rejected=rejected,
        meta=reader.typed("meta", record, dict, {}),
        media_info=reader.media(reader.typed("media", record, list, []), sizes),
    )
    check_references(sample, len(sizes))
    return sample


def check_references(sample: Sample, count: int) -> None:
    """Every image part has a medium, and every medium is shown by some message. Raises DataError."""
    shown = {ref for message in (*sample.messages, *sample.rejected) for ref in references(message)}
    if shown != set(range(count)):
        expected, found = sorted(shown), list(range(count))
        raise DataError(
            f"sample {sample.key}: placeholder count mismatch: messages show media {expected}, found media {found}"
        )


def references(message: Message) -> list[int]:
    """The media a message shows, in reading order."""
    return [part.ref for part in message.content if part.type == "image"]


def dump_sample(sample: Sample) -> bytes:
    """The json member of a sample; sizes and hashes of its media are measured. Raises DataError on a bad sample."""
    media = [_describe(sample.key, content) for content in sample.media]
    record = {
        "v": VERSION,
        "messages": [_dump_message(message) for message in sample.messages],
        "media": media,
        "source": sample.source,
        "license": sample.license,
        "tags": list(sample.tags),
        "answer": sample.answer,
        "rejected": [_dump_message(message) for message in sample.rejected],
        "meta": dict(sample.meta),
    }
    kept = {name: value for name, value in record.items() if value not in ("", [], {}, None)}
    try:
        dumped = json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(f"sample {sample.key}: expected values that json can hold, found {error}") from error
    parse_record(sample.key, dumped, [len(content) for content in sample.media])
    return dumped


def _describe(key: str, content: bytes) -> dict[str, Any]:
    width, height = image_size(content, key)
    return {"w": width, "h": height, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _dump_message(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part.text} if part.type == "text" else {"type": "image", "ref": part.ref}
        for part in message.content
    ]
    dumped: dict[str, Any] = {"role": message.role, "content": parts}
    if not message.loss:
        dumped["loss"] = False
    if message.weight != 1.0:
        dumped["weight"] = message.weight
    return dumped


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} twice")
    return dict(pairs)


def _not_a_number(name: str) -> float:
    raise ValueError(f"number {name}")


@dataclass(frozen=True)
class _Reader:
    """Reads json values and says, where one is wrong, which sample and field it was."""

    key: str

    def error(self, where: str, expected: str, found: object) -> DataError:
        shown = found if isinstance(found, _Described) else _Described(repr(found)[:80])
        return DataError(f"sample {self.key}: {where or 'json'}: expected {expected}, found {shown}")

    def document(self, content: bytes) -> dict[str, Any]:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("", "utf-8", _Described(f"byte {content[error.start]:#04x} at {error.start}")) from None
        try:
            record = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_a_number)
        except (ValueError, RecursionError) as error:
            raise self.error("", "a json object", _Described(str(error))) from None
        if not isinstance(record, dict):
            raise self.error("", "a json object", record)
        return record

    def fields(self, where: str, record: object, known: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
        if not isinstance(record, dict):
            raise self.error(where, "an object", record)
        inside = f"{where}." if where else ""
        for name in record:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise self.error(f"{inside}{name}", f"one of {', '.join(known)}", _Described(f"unknown field{hint}"))
        for name in required:
            if name not in record:
                raise self.error(f"{inside}{name}", "a value", _Described("nothing"))
        return record

    def typed(self, name: str, record: dict[str, Any], kind: type, default: Any) -> Any:
        value = record.get(name, default)
        if not isinstance(value, kind):
            raise self.error(name, {list: "a list", dict: "an object"}[kind], value)
        return value

    def text(self, where: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(where, "a string", value)
        if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise self.error(where, "text", _Described("half a surrogate pair"))
        return value

    def messages(self, where: str, value: object, roles: Sequence[str], least: int = 1) -> tuple[Message, ...]:
        if not isinstance(value, list) or len(value) < least:
            raise self.error(where, f"a list of {least} or more messages", value)
        return tuple(self.message(f"{where}[{n}]", item, roles) for n, item in enumerate(value))

    def message(self, where: str, value: object, roles: Sequence[str]) -> Message:
        item = self.fields(where, value, ("role", "content", "loss", "weight"), required=("role", "content"))
        if item["role"] not in roles:
            raise self.error(f"{where}.role", f"one of {', '.join(roles)}", item["role"])
        if item["role"] != "assistant" and item.keys() & {"loss", "weight"}:
            raise self.error(where, "loss and weight on assistant turns only", item["role"])
        if not isinstance(item["content"], list) or not item["content"]:
            raise self.error(f"{where}.content", "a list of parts", item["content"])
        parts = tuple(self.part(f"{where}.content[{n}]", part) for n, part in enumerate(item["content"]))
        loss = item.get("loss", True)
        if not isinstance(loss, bool):
            raise self.error(f"{where}.loss", "true or false", loss)
        return Message(item["role"], parts, loss, self.weight(f"{where}.weight", item.get("weight", 1.0)))

    def weight(self, where: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.error(where, "a number of at least 0", value)
        return float(value)

    def part(self, where: str, value: object) -> Part:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "text":
            item = self.fields(where, value, ("type", "text"), required=("text",))
            return Part("text", text=self.text(f"{where}.text", item["text"]))
        if kind == "image":
            item = self.fields(where, value, ("type", "ref"), required=("ref",))
            return Part("image", ref=self.natural(f"{where}.ref", item["ref"]))
        raise self.error(where, "a part of type text or image", value)

    def natural(self, where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(where, "a number of at least 0", value)
        return value

    def answer(self, value: object) -> str | float | bool | None:
        if isinstance(value, str):
            return self.text("answer", value)
        if value is not None and not isinstance(value, bool | int | float):
            raise self.error("answer", "a string, a number, true or false", value)
        return value

    def media(self, items: list[object], sizes: Sequence[int]) -> tuple[MediumInfo, ...]:
        if not items:
            return ()
        if len(items) != len(sizes):
            raise self.error("media", f"{len(sizes)} entries, one per media member", _Described(f"{len(items)}"))
        return tuple(
            self.medium(f"media[{n}]", item, size) for n, (item, size) in enumerate(zip(items, sizes, strict=True))
        )

    def medium(self, where: str, value: object, size: int) -> MediumInfo:
        item = self.fields(where, value, _MEDIUM_FIELDS, required=())
        width, height, stated = (
            self.natural(f"{where}.{name}", item[name]) if name in item else None for name in ("w", "h", "bytes")
        )
        if stated is not None and stated != size:
            raise self.error(f"{where}.bytes", f"{size}, the size of the member", stated)
        sha256 = self.text(f"{where}.sha256", item["sha256"]) if "sha256" in item else None
        return MediumInfo(width, height, stated, sha256)


class _Described(str):
    """What was found, already in words."""

    __slots__ = ()
