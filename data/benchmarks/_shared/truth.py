"""What is in each image, for CHAIR: from COCO's annotation files or from a plain list.

COCO: the categories of an image's instances together with the objects its reference captions name.
Plain: {"image key": ["cup", ...]}. Several files add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.benchmarks._shared.objects import Vocabulary
from vlm.data.errors import DataError


def truth_files(truth: str | Sequence[str]) -> tuple[str, ...]:
    """The files that a recipe names: one, or several that add up."""
    return (truth,) if isinstance(truth, str) else tuple(truth)


def read_truth(paths: Sequence[str], vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    """Image key (COCO's `file_name`) -> categories present, in the order of the files.

    Raises:
        DataError: a file is missing, is no such JSON, or names an object the vocabulary does not know.
    """
    truth: dict[str, frozenset[str]] = {}
    for path in paths:
        for image, objects in _objects(path, vocabulary):
            truth[image] = truth.get(image, frozenset()) | objects
    return truth


def _load(path: str) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"chair: no truth file {path!r}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"chair: {path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"chair: {path}: expected an object of images, found a {type(content).__name__}")
    return content


def _objects(path: str, vocabulary: Vocabulary) -> Iterator[tuple[str, frozenset[str]]]:
    content = _load(path)
    if "images" in content and "annotations" in content:
        yield from _coco(path, content, vocabulary)
        return
    for image, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"chair: {path}: image {image!r}: expected a list of names, found {names!r}")
        yield image, vocabulary.categories(names)


def _coco(path: str, content: Mapping[str, Any], vocabulary: Vocabulary) -> Iterator[tuple[str, frozenset[str]]]:
    """Every image of a COCO file, then what each annotation adds to it."""
    categories = {c["id"]: vocabulary.category(c["name"]) for c in content.get("categories", ())}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for file in files.values():
        yield file, frozenset()
    for annotation in content["annotations"]:
        image = files.get(annotation["image_id"])
        if image is None:
            raise DataError(f"chair: {path}: annotation of image {annotation['image_id']}, which is not listed")
        if "caption" in annotation:
            yield image, frozenset(mention.object for mention in vocabulary.mentions(annotation["caption"]))
        elif annotation.get("category_id") in categories:
            yield image, frozenset({categories[annotation["category_id"]]})
        else:
            found = annotation.get("category_id")
            raise DataError(f"chair: {path}: annotation without caption or known category (found {found!r})")
