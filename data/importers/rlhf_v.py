"""Preference pairs as RLHF-V and RLAIF-V give them, or in the plain form {image, question, chosen, rejected}."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from vlm.data.decode import image_extension
from vlm.data.errors import DataError
from vlm.data.importers.common import Keys, json_records, read_image, samples
from vlm.data.schema import Message, Part, Sample

_TEXTS = ("question", "chosen", "rejected")
_MARK = "<image>"


def read_rlhf_v(
    annotations: str | Path,
    images: str | Path,
    on_bad: Literal["error", "skip"] = "error",
    source: str = "",
    license: str = "",
) -> Iterator[Sample]:
    """Samples with a rejected answer, of a `.json` list, a `.jsonl` file or a `.parquet` file (with `pyarrow`).

    A record has `question`, `chosen` and `rejected`, perhaps inside `text` as a JSON string, as the first release of
    RLHF-V has them; its image is a path in the folder (`image` or `image_path`) or, in parquet, the bytes themselves. A
    mark `<image>` in the question is taken out, for images stand before it. Other fields are kept in `meta`.

    Raises:
        DataError: a record of another shape, equal answers, a missing image or one outside the folder. With
            `on_bad="skip"` such records are counted and logged instead.
    """
    keys, folder = Keys(), Path(images)
    records = _records(Path(annotations))
    yield from samples(annotations, records, on_bad, lambda n, r: _sample(keys, n, r, folder, source, license))


def _records(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _rows(path)
        return
    yield from json_records(path)


def _rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: parquet needs the package 'pyarrow', which is not installed") from None
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except FileNotFoundError:
        raise DataError(f"{path}: expected a file, found none") from None
    except ArrowInvalid as error:
        raise DataError(f"{path}: expected parquet, found {str(error).splitlines()[0]}") from None


def _sample(keys: Keys, number: int, record: Any, folder: Path, source: str, license: str) -> Sample:
    if not isinstance(record, Mapping):
        raise DataError(f"record {number}: expected an object, found {record!r:.60}")
    given = record.get("id", record.get("idx"))
    key = keys.make(str(number) if given in (None, "") else str(given))
    texts = _texts(key, record)
    extension, content = _image(key, record, folder)
    question = texts["question"].replace(_MARK, "").strip()
    if texts["chosen"] == texts["rejected"]:
        raise DataError(f"sample {key}: rejected: expected another answer than chosen, found the same")
    used = {*_TEXTS, "text", "image", "image_path", "id", "idx"}
    return Sample(
        key=key,
        messages=(
            Message("user", (Part("image", ref=0), Part("text", question))),
            Message("assistant", (Part("text", texts["chosen"]),)),
        ),
        media=(content,),
        media_ext=(extension,),
        source=source,
        license=license,
        rejected=(Message("assistant", (Part("text", texts["rejected"]),)),),
        meta={name: value for name, value in record.items() if name not in used},
    )


def _texts(key: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Question and answers, at the top of a record or inside its ``text``."""
    inside: Any = record.get("text") if "chosen" not in record else record
    if isinstance(inside, str):
        try:
            inside = json.loads(inside)
        except ValueError:
            raise DataError(f"sample {key}: text: expected json of a pair, found {inside[:40]!r}") from None
    inside = inside if isinstance(inside, Mapping) else {}
    for name in _TEXTS:
        if not isinstance(inside.get(name), str) or not inside[name].strip():
            raise DataError(f"sample {key}: {name}: expected text, found {inside.get(name)!r:.60}")
    return {name: inside[name] for name in _TEXTS}


def _image(key: str, record: Mapping[str, Any], folder: Path) -> tuple[str, bytes]:
    """Extension and bytes of a record's image: a path, bytes, an object of bytes, or base64 in an object."""
    value = record.get("image")
    value = record.get("image_path") if value is None else value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and len(value) > 1024:
            try:
                value = base64.b64decode(value, validate=True)
            except (ValueError, binascii.Error):
                raise DataError(f"sample {key}: image: expected base64, found {value[:40]!r}") from None
    if isinstance(value, bytes):
        return image_extension(value, key), value
    if not isinstance(value, str) or not value:
        raise DataError(f"sample {key}: image: expected a path or bytes, found {value!r:.60}")
    return read_image(folder, value, key)
