"""Score answers that something else wrote: another kit, an API, an earlier run.

Answers belong to questions by id and never by place. A file may be a JSON object of answers by id (or of records by
id), JSON lines or a JSON array of records, or what a benchmark's own `read_answers` takes. A record without an id is
taken only where it repeats its question, which is then checked. Whatever would give a number of something else is an
error: an id that is missing, unknown, repeated or out of order, a label that is neither yes nor no or not the
question's. Empty answers are legal, scored as they are, and counted.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.benchmarks._shared.contract import Benchmark, Question
from vlm.data.benchmarks._shared.files import read_records, read_text, yes_no_label
from vlm.data.benchmarks._shared.images import missing_images
from vlm.data.errors import DataError

ID_KEYS = ("question_id", "id", "pid", "qid", "image_id")
# "answer" and "text" come last: beside one of the others they are the right answer and the question
ANSWER_KEYS = ("response", "prediction", "model_prediction", "model_answer", "caption", "output", "answer", "text")
_QUESTION_KEYS = ("question", "prompt", "query")


class Given(NamedTuple):
    """One answer of a file: for which question, the text, where it stands, and the label it claims, if any."""

    id: str
    answer: Any
    where: str
    label: Any = None


@dataclass(frozen=True)
class FileScore:
    """What a file of answers scores: numbers and protocol by group, empty answers by group of questions, and the
    keys of images that the folder lacks (None: `images` is "", so there is no folder to look in)."""

    scores: dict[str, dict[str, Any]]
    protocol: dict[str, dict[str, Any]]
    n: int
    empty: dict[str, int]
    missing_images: list[str] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_file(
    benchmark: Benchmark,
    path: str | Path,
    *,
    id_key: str | None = None,
    answer_key: str | None = None,
    any_order: bool = False,
) -> FileScore:
    """Score a file of answers.

    Args:
        id_key, answer_key: names of the record's fields where they are none of the usual ones.
        any_order: take ids in another order than that of the questions.

    Raises:
        DataError: as `read_answers`, or the benchmark cannot be scored.
    """
    questions = benchmark.ask()
    answers = read_answers(benchmark, path, id_key=id_key, answer_key=answer_key, any_order=any_order)
    empty = Counter(question.group for question in questions if not answers[question.id].strip())
    return FileScore(
        benchmark.score(answers),
        benchmark.protocol(),
        len(questions),
        dict(empty),
        missing_images(benchmark.images, questions) if benchmark.images else None,
    )


def read_answers(
    benchmark: Benchmark,
    path: str | Path,
    *,
    id_key: str | None = None,
    answer_key: str | None = None,
    any_order: bool = False,
) -> dict[str, str]:
    """The answers of a file by question id, one for every question.

    Raises:
        DataError: no such file or form; an id is missing, unknown, repeated or out of order; an answer is no text; a
            label is neither yes nor no or not the question's.
    """
    name = type(benchmark).__name__.lower()
    questions = benchmark.ask()
    own = getattr(benchmark, "read_answers", None)
    given = own(path) if own is not None and id_key is None and answer_key is None else None
    if given is None:
        given = _generic(name, Path(path), questions, id_key, answer_key)
    return _matched(name, str(path), benchmark, questions, list(given), any_order)


def _generic(
    name: str, path: Path, questions: Sequence[Question], id_key: str | None, answer_key: str | None
) -> list[Given]:
    """The answers of a file in one of the forms that every benchmark takes."""
    text = read_text(path, name, "file of answers")
    content = _object(text)
    if content is not None and not any(key in content for key in (*ID_KEYS, *ANSWER_KEYS)):
        return [
            _of_record({"id": key, **value}, f"{name}: {path}: {key!r}", "id", answer_key)
            if isinstance(value, dict)
            else Given(key, value, f"{name}: {path}: {key!r}")
            for key, value in content.items()
        ]
    records = read_records(path, name, "file of answers")
    places = [f"{name}: {path}: answer {number}" for number in range(1, len(records) + 1)]
    found = id_key or next((key for key in ID_KEYS if all(key in record for record in records)), None)
    if found is None:
        records = _by_question(name, str(path), records, questions)
        found = ""
    return [_of_record(record, where, found, answer_key) for record, where in zip(records, places, strict=True)]


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, None where it is something else (JSON lines, say)."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _of_record(record: Mapping[str, Any], where: str, id_key: str, answer_key: str | None) -> Given:
    if id_key not in record:
        raise DataError(f"{where} lacks {id_key}; found {', '.join(record)}")
    found = [key for key in ((answer_key,) if answer_key else ANSWER_KEYS) if key in record]
    if not found:
        raise DataError(f"{where} lacks {answer_key or 'an answer'}; found {', '.join(k for k in record if k)}")
    if found[:2] == ["answer", "text"]:
        raise DataError(f"{where} has both answer and text; name the one with the answer (answer_key)")
    return Given(str(record[id_key]), record[found[0]], where, record.get("label"))


def _by_question(
    name: str, path: str, records: Sequence[Mapping[str, Any]], questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """Records without ids, in the order of the questions that each of them repeats; the id comes in under ""."""
    key = next((key for key in _QUESTION_KEYS if all(key in record for record in records)), None)
    if key is None:
        expected = ", ".join(ID_KEYS)
        raise DataError(f"{name}: {path}: expected an id in every record ({expected}), found {', '.join(records[0])}")
    if len(records) != len(questions):
        raise DataError(f"{name}: {path}: expected {len(questions)} answers without ids, found {len(records)}")
    for number, (record, question) in enumerate(zip(records, questions, strict=True), start=1):
        if _plain(str(record[key])) not in _plain(question.prompt):
            raise DataError(
                f"{name}: {path}: answer {number}: expected the question {question.prompt!r}, found {record[key]!r}"
            )
    return [{"": question.id, **record} for record, question in zip(records, questions, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _matched(
    name: str, path: str, benchmark: Benchmark, questions: Sequence[Question], given: list[Given], any_order: bool
) -> dict[str, str]:
    aliases = _aliases(benchmark, questions)
    known = {question.id for question in questions}
    ids = [one.id if one.id in known else aliases.get(one.id, one.id) for one in given]
    _refuse_unknown(name, path, ids, given, known)
    answers: dict[str, str] = {}
    labels: Mapping[str, str] = benchmark.labels() if hasattr(benchmark, "labels") else {}  # pyright: ignore[reportAttributeAccessIssue]
    for key, one in zip(ids, given, strict=True):
        if key in answers:
            raise DataError(f"{one.where}: {one.id!r} comes twice; expected every question once")
        if one.label is not None and key in labels and yes_no_label(one.label, one.where) != labels[key]:
            raise DataError(f"{one.where}: {one.id!r}: expected the label {labels[key]!r}, found {one.label!r}")
        answers[key] = _text(one)
    if missing := [question.id for question in questions if question.id not in answers]:
        shown = ", ".join(map(repr, missing[:3]))
        raise DataError(f"{name}: {path}: {len(missing)} of {len(questions)} questions have no answer: {shown}")
    if not any_order:
        _refuse_disorder(ids, given, questions)
    return answers


def _text(one: Given) -> str:
    """The answer as text; none at all is an empty one."""
    if one.answer is None:
        return ""
    if isinstance(one.answer, bool) or not isinstance(one.answer, str | int | float):
        raise DataError(f"{one.where}: expected an answer in words, found {one.answer!r}")
    return str(one.answer)


def _aliases(benchmark: Benchmark, questions: Sequence[Question]) -> dict[str, str]:
    """Other names of ids: the benchmark's own, and an id without its group where only one question has that."""
    short = Counter(question.id.removeprefix(f"{question.group}/") for question in questions)
    tails = ((question.id.removeprefix(f"{question.group}/"), question.id) for question in questions)
    own = benchmark.aliases() if hasattr(benchmark, "aliases") else {}  # pyright: ignore[reportAttributeAccessIssue]
    return {tail: key for tail, key in tails if short[tail] == 1} | dict(own)


def _refuse_unknown(name: str, path: str, ids: Iterable[str], given: Sequence[Given], known: set[str]) -> None:
    strange = [one for key, one in zip(ids, given, strict=True) if key not in known]
    if strange:
        near = difflib.get_close_matches(strange[0].id, known, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise DataError(
            f"{name}: {path}: {len(strange)} of {len(given)} answers are of no question, the first is {strange[0].id!r}"
            f"{hint}"
        )


def _refuse_disorder(ids: Sequence[str], given: Sequence[Given], questions: Sequence[Question]) -> None:
    for key, one, question in zip(ids, given, questions, strict=True):
        if key != question.id:
            raise DataError(
                f"{one.where}: expected {question.id!r} in the order of the questions, found {one.id!r}; with any_order"
                " ids count and order does not"
            )
