"""POPE's question files: JSON lines, JSON arrays (SEEM) and LLaVA's joined file, by split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.benchmarks._shared.files import need, read_records, unique, yes_no_label
from vlm.data.benchmarks._shared.pope_builder import SPLITS
from vlm.data.benchmarks._shared.yes_no import Label
from vlm.data.errors import DataError


@dataclass(frozen=True)
class PopeItem:
    """A question about one object: its id in the benchmark, and what its file says."""

    id: str
    image: str
    text: str
    label: Label
    split: str


def check_files(questions: Sequence[str], benchmark: str) -> None:
    """Raise DataError unless `questions` is a list of files."""
    if isinstance(questions, str) or not questions:
        raise DataError(f"{benchmark}: questions: expected a list of files, found {questions!r}")


def read_splits(paths: Sequence[str], limit: int | None, benchmark: str) -> dict[str, list[PopeItem]]:
    """The items of every split, in file order, cut to `limit`; an id is the split and the file's question_id.

    Raises:
        DataError: a file is missing or not in the format, or a split has an id twice.
    """
    splits: dict[str, list[PopeItem]] = {}
    for path in paths:
        for item in _read(path, benchmark):
            splits.setdefault(item.split, []).append(item)
    for split, items in splits.items():
        unique((item.id for item in items), f"{benchmark}: split {split!r} has a question_id twice in {list(paths)}")
    return {split: items[:limit] for split, items in splits.items()}


def _split_of(path: str, record: Mapping[str, Any]) -> str:
    if "category" in record:
        return str(record["category"])
    stem = Path(path).stem
    return next((split for split in SPLITS if split in stem), stem)


def _read(path: str, benchmark: str) -> list[PopeItem]:
    items = []
    for number, record in enumerate(read_records(path, benchmark, "question file"), start=1):
        where = f"{benchmark}: {path}: question {number}"
        need(record, ("question_id", "image", "text", "label"), where)
        label = yes_no_label(record["label"], where)
        split = _split_of(path, record)
        items.append(PopeItem(f"{split}/{record['question_id']}", record["image"], record["text"], label, split))
    return items
