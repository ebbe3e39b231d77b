"""MME: fourteen tasks of yes-no questions, two per image (Fu et al. 2023, "MME: A Comprehensive Evaluation Benchmark
for Multimodal Large Language Models").

A task's score is 100 times the share of right answers plus 100 times the share of images with both answers right, so
at most 200: with thirty images one answer moves it by up to five points, which the intervals show. The sums are
perception (ten tasks), cognition (four) and the hallucination subset (existence, count, position, colour).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, check_prompt, one_of, read_text, unique, yes_no_label
from vlm.data.benchmarks._shared.predictions import Given
from vlm.data.benchmarks._shared.statistics import rate, rate_change, sum_of_means
from vlm.data.benchmarks._shared.yes_no import Label, parser_named
from vlm.data.errors import DataError

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)
_SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}


@dataclass(frozen=True)
class _Item:
    id: str
    image: str
    text: str
    label: Label


@dataclass(frozen=True)
class Mme:
    """MME over a folder of its question files, one `<task>.txt` per task.

    Attributes:
        questions: folder of tab-separated files: image, question, answer; two lines per image, one yes and one no.
        images: folder of image files or of shards.
        tasks: the tasks to ask; all whose files are there when null.
        image: how an image is called in `images`, of {task} and {image}.
        prompt: "{}" stands for the question, which already asks for yes or no.
        parser: mme (official), or one of POPE's.
        max_new_tokens: answers are cut there.
        limit: only the first so many images of every task.
    """

    questions: str
    images: str
    tasks: Sequence[str] | None = None
    image: str = "{task}/{image}"
    prompt: str = "{}"
    parser: str = "mme"
    max_new_tokens: int = 8
    limit: int | None = None

    source: ClassVar[str] = "MME, Fu et al. 2023 (arXiv:2306.13394), section 2.2; calculation.py of its eval tool"
    verified: ClassVar[str] = "hand-computed cases and a restatement of the official formula; tasks' files not at hand"

    def __post_init__(self) -> None:
        for task in self.tasks or ():
            one_of(task, TASKS, "mme: task")
        if "{image}" not in self.image:
            raise DataError(f"mme: image: expected {{image}} in it, and perhaps {{task}}, found {self.image!r}")
        check_prompt(self.prompt, "mme")
        parser_named(self.parser, "mme")
        check_limit(self.limit, "mme")

    @cached_property
    def _tasks(self) -> dict[str, list[_Item]]:
        """The items of every task, two per image, cut to `limit` images."""
        folder = Path(self.questions)
        if not folder.is_dir():
            raise DataError(f"mme: questions: expected a folder of task files, found no folder {self.questions!r}")
        chosen = self.tasks or [task for task in TASKS if (folder / f"{task}.txt").is_file()]
        if not chosen:
            raise DataError(f"mme: {self.questions}: no task file; expected some of {', '.join(TASKS)} (.txt)")
        last = None if self.limit is None else 2 * self.limit
        return {task: self._read(task, folder / f"{task}.txt")[:last] for task in chosen}

    def _read(self, task: str, path: Path) -> list[_Item]:
        items = []
        for where, fields in _rows(path, 3):
            image, text, label = fields[:3]
            number = 1 + len(items) % 2
            items.append(_Item(f"{task}/{image}/{number}", image, text, yes_no_label(label, where)))
            if number == 2:
                _check_pair(items[-2], items[-1], where)
        if not items or len(items) % 2:
            raise DataError(f"mme: {path}: expected two lines per image, found {len(items)} lines")
        unique((item.id for item in items), f"mme: {path}")
        return items

    def ask(self) -> list[Question]:
        """Every question, task by task."""
        return [
            Question(
                item.id,
                (self.image.replace("{task}", task).replace("{image}", item.image),),
                self.prompt.replace("{}", item.text),
                task,
            )
            for task, items in self._tasks.items()
            for item in items
        ]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per task accuracy, accuracy_plus, score (of 200), n, ci (of accuracy), ci_score and unknown; per sum of
        tasks that are all there score, ci (of it, in points), maximum and n.

        Raises:
            DataError: a question has no answer.
        """
        right, unknown = self._judge(answers)
        scores: dict[str, dict[str, Any]] = {}
        for task, given in right.items():
            points = sum_of_means([_points(given)])
            scores[task] = {
                **rate(given),
                "accuracy_plus": sum(_both(given)) / len(_both(given)),
                "score": points.difference,
                "ci_score": list(points.ci),
                "unknown": unknown[task],
            }
        for name, tasks in self._sums().items():
            total = sum_of_means([_points(right[task]) for task in tasks])
            n = sum(len(right[task]) for task in tasks)
            scores[name] = {"score": total.difference, "ci": list(total.ci), "maximum": 200 * len(tasks), "n": n}
        return scores

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per task change of accuracy (McNemar) and of score, per sum change of score (bootstrap paired by image)."""
        before, after = self._judge(baseline)[0], self._judge(answers)[0]
        moved = {
            task: [new - old for old, new in zip(_points(before[task]), _points(after[task]), strict=True)]
            for task in before
        }
        changes: dict[str, dict[str, Any]] = {
            task: {
                "accuracy": rate_change(before[task], after[task]),
                "score": sum_of_means([values]).to_dict(),
            }
            for task, values in moved.items()
        }
        for name, tasks in self._sums().items():
            changes[name] = {"score": sum_of_means([moved[task] for task in tasks]).to_dict()}
        return changes

    def labels(self) -> dict[str, str]:
        """The right answer to every question, by id."""
        return {item.id: item.label for items in self._tasks.values() for item in items}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every task and of every sum."""
        sizes = {task: len(items) for task, items in self._tasks.items()}
        groups = {**{task: (task,) for task in sizes}, **self._sums()}
        return {
            name: card_of(
                self,
                [Path(self.questions) / f"{task}.txt" for task in tasks],
                sum(sizes[task] for task in tasks),
                prompt=self.prompt,
                parser=self.parser,
            )
            for name, tasks in groups.items()
        }

    def read_answers(self, path: str | Path) -> list[Given] | None:
        """The official form, a folder of `<task>.txt` with the answer as fourth column; None where it is no folder.

        Raises:
            DataError: a line has not four columns (a line break or tab in an answer must be escaped), or differs from
                the question file.
        """
        folder = Path(path)
        if not folder.is_dir():
            return None
        given = []
        for task, items in self._tasks.items():
            rows = list(_rows(folder / f"{task}.txt", 4))[: len(items) if self.limit else None]
            if len(rows) != len(items):
                raise DataError(f"mme: {folder / task}.txt: expected {len(items)} lines, found {len(rows)}")
            for item, (where, (image, text, label, answer)) in zip(items, rows, strict=True):
                if (image, text, yes_no_label(label, where)) != (item.image, item.text, item.label):
                    raise DataError(f"{where}: expected {item.image} {item.text!r}, found {image} {text!r}")
                given.append(Given(item.id, unescape(answer), where, label))
        return given

    def write_answers(self, answers: Mapping[str, str], folder: str | Path) -> None:
        """Write answers in the official form, with tabs and line breaks escaped."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for task, items in self._tasks.items():
            given = answers_in_order([item.id for item in items], answers, "mme")
            lines = [
                "\t".join((item.image, item.text, item.label.capitalize(), escape(answer))) + "\n"
                for item, answer in zip(items, given, strict=True)
            ]
            (Path(folder) / f"{task}.txt").write_text("".join(lines), encoding="utf-8")

    def _sums(self) -> dict[str, tuple[str, ...]]:
        return {name: tasks for name, tasks in _SUMS.items() if all(task in self._tasks for task in tasks)}

    def _judge(self, answers: Mapping[str, str]) -> tuple[dict[str, list[bool]], dict[str, int]]:
        """Right or wrong per question, and how many answers the parser could not read, by task."""
        read = parser_named(self.parser, "mme").read
        right, unknown = {}, {}
        for task, items in self._tasks.items():
            given = answers_in_order([item.id for item in items], answers, "mme")
            said = [read(text, item.label) for text, item in zip(given, items, strict=True)]
            right[task] = [one == item.label for one, item in zip(said, items, strict=True)]
            unknown[task] = said.count("unknown")
        return right, unknown


def escape(answer: str) -> str:
    r"""An answer on one line of tab-separated text: backslash, tab and line breaks as \\, \t, \n and \r."""
    for sign, name in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        answer = answer.replace(sign, name)
    return answer


def unescape(text: str) -> str:
    """What `escape` was given."""
    signs = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
    found, place = [], 0
    while place < len(text):
        escaped = text[place] == "\\" and text[place + 1 : place + 2] in signs and place + 1 < len(text)
        found.append(signs[text[place + 1]] if escaped else text[place])
        place += 2 if escaped else 1
    return "".join(found)


def _rows(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """(place, fields) of every line of a tab-separated file; question files may have answers behind them."""
    for number, line in enumerate(read_text(path, "mme", "task file").splitlines(), start=1):
        if not line.strip():
            continue
        where, fields = f"mme: {path}:{number}", line.split("\t")
        if len(fields) not in (columns, 4):
            raise DataError(f"{where}: expected {columns} columns with tabs between, found {len(fields)}")
        yield where, fields


def _check_pair(first: _Item, second: _Item, where: str) -> None:
    if first.image != second.image:
        raise DataError(f"{where}: expected the second question about {first.image!r}, found {second.image!r}")
    if first.label == second.label:
        raise DataError(f"{where}: expected one yes and one no about {first.image!r}, found {first.label} twice")


def _both(right: Sequence[bool]) -> list[bool]:
    """Per image: are both answers right?"""
    return [a and b for a, b in zip(right[::2], right[1::2], strict=True)]


def _points(right: Sequence[bool]) -> list[float]:
    """Per image: what it adds to the mean that is the task's score."""
    return [50.0 * (a + b) + 100.0 * (a and b) for a, b in zip(right[::2], right[1::2], strict=True)]
