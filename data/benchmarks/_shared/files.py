"""Read the files that benchmarks come in: JSON, JSON lines, CSV; each mistake is one line with its place."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlm.data.errors import DataError


def read_text(path: str | Path, benchmark: str, what: str = "file") -> str:
    """The text of a file (UTF-8, a byte order mark is dropped).

    Raises:
        DataError: no such file, or not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{benchmark}: no {what} {str(path)!r}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{benchmark}: {path}: expected UTF-8, found {error.reason} at byte {error.start}") from None


def read_json(path: str | Path, benchmark: str, what: str = "file") -> Any:
    """The value in a JSON file. Raises DataError as `read_text` does, and where it is no JSON."""
    try:
        return json.loads(read_text(path, benchmark, what))
    except json.JSONDecodeError as error:
        raise DataError(f"{benchmark}: {path}: not JSON: {error}") from None


def read_records(path: str | Path, benchmark: str, what: str = "file") -> list[dict[str, Any]]:
    """The objects of a file of JSON lines or of a JSON array.

    Raises:
        DataError: no such file, neither form, no record, or one that is no object.
    """
    text = read_text(path, benchmark, what)
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{benchmark}: {path}: neither JSON lines nor a JSON array: {error}") from None
    if not records:
        raise DataError(f"{benchmark}: {path}: no questions")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{benchmark}: {path}: record {number}: expected an object, found {record!r}")
    return records


def read_csv(path: str | Path, benchmark: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, columns by name.

    Raises:
        DataError: no such file, a column is missing, a row is of another length, or there is none.
    """
    rows = csv.DictReader(io.StringIO(read_text(path, benchmark), newline=""), strict=True)
    try:
        header = list(rows.fieldnames or ())
        lacking = [column for column in columns if column not in header]
        if lacking:
            raise DataError(f"{benchmark}: {path}: lacks the column {', '.join(lacking)}; found {', '.join(header)}")
        found = []
        for row in rows:
            if None in row or None in row.values():
                raise DataError(f"{benchmark}: {path}:{rows.line_num}: expected {len(header)} fields as in the header")
            found.append(row)
    except csv.Error as error:
        raise DataError(f"{benchmark}: {path}:{rows.line_num}: not CSV: {error}") from None
    if not found:
        raise DataError(f"{benchmark}: {path}: no questions")
    return found


def need(record: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Raise DataError unless the record has all of the keys."""
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise DataError(f"{where} lacks {', '.join(lacking)}; found {', '.join(map(str, record)) or 'nothing'}")


def yes_no_label(value: Any, where: str) -> Literal["yes", "no"]:
    """The label in lower case. Raises DataError where it is neither yes nor no."""
    label = str(value).strip().lower()
    if label == "yes":
        return "yes"
    if label == "no":
        return "no"
    raise DataError(f"{where}: label {value!r} is neither yes nor no")


def one_of(value: str, known: Iterable[str], where: str) -> str:
    """The value itself. Raises DataError where it is none of the known ones, with the nearest."""
    names = list(known)
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise DataError(f"{where} {value!r} is none of {', '.join(names)}{hint}")
    return value


def check_prompt(prompt: str, benchmark: str) -> None:
    """Raise DataError unless the prompt has one place for the question."""
    if prompt.count("{}") != 1:
        raise DataError(f"{benchmark}: prompt: expected one {{}} for the question, found {prompt!r}")


def check_limit(limit: int | None, benchmark: str) -> None:
    """Raise DataError unless the limit is positive or None."""
    if limit is not None and limit < 1:
        raise DataError(f"{benchmark}: limit: expected a positive number or null, found {limit}")


def unique(ids: Iterable[str], where: str) -> None:
    """Raise DataError where an id comes twice."""
    seen: set[str] = set()
    for key in ids:
        if key in seen:
            raise DataError(f"{where}: {key!r} comes twice; expected every question once")
        seen.add(key)
