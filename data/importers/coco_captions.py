"""COCO captions JSON (`images`, `annotations`) with its image folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vlm.data.errors import DataError
from vlm.data.importers.common import Keys, read_image
from vlm.data.schema import Message, Part, Sample

log = logging.getLogger(__name__)

PROMPT = "Describe the image briefly."


def read_coco_captions(
    annotations: str | Path,
    images: str | Path,
    per: Literal["caption", "image"] = "caption",
    prompt: str = PROMPT,
    on_bad: Literal["error", "skip"] = "error",
) -> Iterator[Sample]:
    """One sample per caption, or one per image that answers with its first caption and keeps all in `meta`.

    Images without a caption are left out. Keys are `<image id>-<caption id>` or `<image id>`.

    Raises:
        DataError: a file of another shape, a caption of an unknown image, a missing image or one outside the folder.
            With `on_bad="skip"` images that cannot be read are counted and logged instead.
    """
    if per not in ("caption", "image"):
        raise DataError(f"per: expected caption or image, found {per!r}")
    path = Path(annotations)
    listed, captions, licenses = _tables(path)
    keys, skipped = Keys(), 0
    for number, record in listed.items():
        own = captions.get(number, [])
        groups = [[caption] for caption in own] if per == "caption" else [own] if own else []
        for group in groups:
            key = keys.make(f"{number}-{group[0]['id']}" if per == "caption" else str(number))
            try:
                media = read_image(Path(images), record["file_name"], key)
            except DataError as error:
                if on_bad == "error":
                    raise
                skipped += 1
                log.warning("%s skipped: %s", path, error)
                continue
            yield _sample(key, record, group, media, prompt, licenses)
    if skipped:
        log.warning("%s: %d samples skipped", path, skipped)


def _sample(
    key: str,
    record: dict[str, Any],
    captions: list[dict[str, Any]],
    media: tuple[str, bytes],
    prompt: str,
    licenses: dict[Any, str],
) -> Sample:
    extension, content = media
    texts = [caption["caption"].strip() for caption in captions]
    return Sample(
        key,
        (
            Message("user", (Part("image", ref=0), Part("text", prompt))),
            Message("assistant", (Part("text", texts[0]),)),
        ),
        (content,),
        (extension,),
        source="coco-captions",
        license=licenses.get(record.get("license"), ""),
        meta={"image_id": record["id"], "file_name": record["file_name"], "captions": texts},
    )


def _tables(path: Path) -> tuple[dict[Any, dict[str, Any]], dict[Any, list[dict[str, Any]]], dict[Any, str]]:
    """Images by id, captions by image id, names of licences by id."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: expected a file, found none") from None
    except ValueError as error:
        raise DataError(f"{path}: expected utf-8 json, found {error}") from error
    listed = {item["id"]: item for item in _list(path, record, "images", {"id": int | str, "file_name": str})}
    captions: dict[Any, list[dict[str, Any]]] = {}
    wanted = {"id": int | str, "image_id": int | str, "caption": str}
    for item in sorted(_list(path, record, "annotations", wanted), key=lambda item: str(item["id"]).zfill(20)):
        if item["image_id"] not in listed:
            raise DataError(f"{path}: annotation {item['id']}: expected a listed image, found id {item['image_id']}")
        captions.setdefault(item["image_id"], []).append(item)
    licenses = record.get("licenses", [])
    names = {item.get("id"): str(item.get("name", "")) for item in licenses if isinstance(item, dict)}
    return listed, captions, names


def _list(path: Path, record: Any, name: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    items = record.get(name) if isinstance(record, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list {name!r}, found none")
    for number, item in enumerate(items):
        for field, kind in fields.items():
            if not isinstance(item, dict) or not isinstance(item.get(field), kind):
                raise DataError(f"{path}: {name}[{number}]: expected {field}, found {item!r:.80}")
    return items
