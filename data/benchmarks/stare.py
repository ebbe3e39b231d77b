r"""STARE: puzzles of space that pictures of the intermediate steps help with (Li et al. 2025, "Unfolding Spatial
Cognition: Evaluating Multimodal Models on Visual Simulations").

The data set is a parquet of Hugging Face; this reads an export of it as JSON lines: qid (or pid), question, answer,
category, and images as names of files. Questions say with `<image>` where their images stand. Answers are read in the
official order: a letter, a number, the last \boxed{}, what follows "answer is".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import IMAGE_MARK, Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, need, one_of, read_records, unique
from vlm.data.benchmarks._shared.judge import Request, ask_judge, open_judge
from vlm.data.benchmarks._shared.numbers import number_in_latex, number_in_words
from vlm.data.benchmarks._shared.statistics import rate, rate_change
from vlm.data.errors import DataError

EXTRACTED = "extracted"
LETTERS = "ABCDEFGH"
FORMAT = '\n\nAnswer with the option\'s letter from the given choices and put the letter in one "\\boxed{}".\n\n'
STRATEGIES = {
    "cot": "Please solve the problem step by step.",
    "direct": "Please ensure that your output only contains the final answer without any additional content (such as "
    "intermediate reasoning steps).",
}
_FLAGS = ("final answer is", "correct answer is", "answer should be", "answer is", "answer:")


@dataclass(frozen=True)
class _Item:
    id: str
    images: tuple[str, ...]
    text: str
    answer: str
    category: str


@dataclass(frozen=True)
class Stare:
    """STARE over one or more exported files.

    Attributes:
        questions: files of JSON lines or arrays: qid or pid, question, answer, category, images (names of files).
        images: folder of the images.
        strategy: direct, or cot to ask for steps first.
        judge: extracted (the rules), a .jsonl file of replies, or the name of an installed judge.
        max_new_tokens: answers are cut there; the official runs allow 4096, at temperature 0.7.
        limit: only the first so many questions of every category.
    """

    questions: Sequence[str]
    images: str
    strategy: str = "direct"
    judge: str = EXTRACTED
    max_new_tokens: int = 4096
    limit: int | None = None

    source: ClassVar[str] = "STARE, Li et al. 2025 (arXiv:2506.04633), section 4; STARE-bench/STARE evaluation"
    verified: ClassVar[str] = (
        "extracts and verdicts equal to those in the released STARE result files; numbers are compared by value, "
        "nothing is simplified symbolically"
    )

    def __post_init__(self) -> None:
        if isinstance(self.questions, str) or not self.questions:
            raise DataError(f"stare: questions: expected a list of files, found {self.questions!r}")
        one_of(self.strategy, STRATEGIES, "stare: strategy")
        check_limit(self.limit, "stare")
        open_judge(self.judge, EXTRACTED, "stare")

    @cached_property
    def _items(self) -> list[_Item]:
        items: list[_Item] = []
        asked: Counter[str] = Counter()
        for path in self.questions:
            for number, record in enumerate(read_records(path, "stare", "question file"), start=1):
                item = _item(record, f"stare: {path}: question {number}")
                asked[item.category] += 1
                if self.limit is None or asked[item.category] <= self.limit:
                    items.append(item)
        unique((item.id for item in items), f"stare: {list(self.questions)}")
        return items

    def ask(self) -> list[Question]:
        """Every question, in the order of the files, with its images where it says."""
        ending = FORMAT + STRATEGIES[self.strategy]
        return [Question(item.id, item.images, item.text + ending, item.category) for item in self._items]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """accuracy, n, ci and unread (answers without an extract) of all questions under "", and of each category.

        Raises:
            DataError: a question has no answer, or the judge gives no reply.
        """
        judged = self._judge(answers)
        groups = {"": judged} | {
            category: [one for item, one in zip(self._items, judged, strict=True) if item.category == category]
            for category in dict.fromkeys(item.category for item in self._items)
        }
        return {
            group: {**rate([right for right, _ in chosen]), "unread": sum(not read for _, read in chosen)}
            for group, chosen in groups.items()
        }

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of accuracy, of all and of each category: difference, ci, p (McNemar, exact)."""
        before, after = ([right for right, _ in self._judge(given)] for given in (baseline, answers))
        changes = {"": {"accuracy": rate_change(before, after)}}
        for category in dict.fromkeys(item.category for item in self._items):
            places = [place for place, item in enumerate(self._items) if item.category == category]
            changes[category] = {"accuracy": rate_change([before[k] for k in places], [after[k] for k in places])}
        return changes

    def judge_requests(self, answers: Mapping[str, str]) -> list[Request]:
        """What a judge is asked about each answer: does its final answer agree, correct or incorrect?"""
        given = answers_in_order([item.id for item in self._items], answers, "stare")
        return [
            Request(
                item.id,
                f"Response: {text}\nRight answer: {item.answer}\nIs the final answer of the response the right one, "
                "whatever leads to it? Reply with one word: correct or incorrect.",
            )
            for item, text in zip(self._items, given, strict=True)
        ]

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of the whole and of every category."""
        counts = Counter(item.category for item in self._items)
        more = {"prompt": "{}" + FORMAT + STRATEGIES[self.strategy], "strategy": self.strategy, "judge": self.judge}
        groups = {"": counts.total(), **counts}
        return {group: card_of(self, list(self.questions), n, **more) for group, n in groups.items()}

    def _judge(self, answers: Mapping[str, str]) -> list[tuple[bool, bool]]:
        """(right, read) of every answer."""
        judge = open_judge(self.judge, EXTRACTED, "stare")
        if judge is not None:
            replies = ask_judge(judge, self.judge_requests(answers), "stare")
            said = [reply.strip().strip(".").lower() for reply in replies]
            return [(one == "correct", one in ("correct", "incorrect")) for one in said]
        given = answers_in_order([item.id for item in self._items], answers, "stare")
        found = [extract(text) for text in given]
        return [(is_equal(one, item.answer), bool(one)) for one, item in zip(found, self._items, strict=True)]


def _item(record: Mapping[str, Any], where: str) -> _Item:
    need(record, ("question", "answer", "category"), where)
    key = record.get("qid", record.get("pid"))
    if key is None:
        raise DataError(f"{where} lacks qid or pid; found {', '.join(record)}")
    images = record.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}: images: expected a list of names of files, found {images!r}")
    marks = record["question"].count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise DataError(f"{where}: expected {len(images)} marks {IMAGE_MARK} in the question, found {marks}")
    return _Item(str(key), tuple(images), record["question"], str(record["answer"]), str(record["category"]))


def extract(response: str) -> str:
    r"""The answer in a response, "" where there is none.

    >>> [extract(text) for text in ("B.", "12", r"so \boxed{\text{C}}", "The correct answer is D.\nBye", "hm")]
    ['B', '12', 'C', 'd', '']
    """
    text = response.strip()
    for letter in LETTERS:
        if text.upper() == letter or text.startswith((f"{letter}:", f"{letter}.")):
            return letter
    if _is_number(text):
        return text
    if boxes := _boxed(text):
        inner = re.findall(r"\\text{(.*?)}", boxes[-1])
        return (inner[-1] if inner else boxes[-1]).strip()
    for flag in _FLAGS:
        if flag in text.lower():
            return text.lower().split(flag)[-1].strip().split("\n")[0].split(".")[0]
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{...}, braces inside it balanced; one that never closes is none."""
    found = []
    for match in re.finditer(r"\\boxed\{", text):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found.append(text[match.end() : place])
                break
    return found


def is_equal(found: str, answer: str) -> bool:
    """Whether an extract is the answer: in letters, as a number in words, or as a number to two decimals."""
    given, right = found.lower().strip(), answer.lower().strip()
    if given == right:
        return True
    words = number_in_words(given)
    if words is not None and str(words) == right:
        return True
    first, second = number_in_latex(given), number_in_latex(right)
    return first is not None and second is not None and round(first, 2) == round(second, 2)
