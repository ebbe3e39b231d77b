"""MMVP: pairs of images that CLIP takes for the same (Tong et al. 2024, "Eyes Wide Shut? Exploring the Visual
Shortcomings of Multimodal LLMs").

Both images of a pair get the same question, the answers are opposite, and a pair counts only if both are right: a
guesser has 25 %. Published numbers are graded by a language model; "string-match" is ours, called so in the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, check_prompt, read_csv
from vlm.data.benchmarks._shared.judge import Request, ask_judge, open_judge
from vlm.data.benchmarks._shared.statistics import mcnemar_exact, paired_bootstrap, wilson
from vlm.data.errors import DataError

COLUMNS = ("Index", "Question", "Options", "Correct Answer")
STRING_MATCH = "string-match"
# pairs (first row, second row), counted from 1, whose labels stand the wrong way round in the official file
SWAPPED = ((99, 100), (279, 280))
_OPTIONS = re.compile(r"\s*\(a\)\s*(?P<a>.+?)\s*\(b\)\s*(?P<b>.+?)\s*", re.IGNORECASE | re.DOTALL)
# "(a)", "a)", "a." or "a:" at the start, or after "answer is", "answer:" and the like anywhere
_LETTER = r"[\(\[]?(?P<letter>[ab])(?:[\)\]\.:,]|\s*$)"
_LEADING = re.compile(r"\s*\**" + _LETTER, re.IGNORECASE)
_ANNOUNCED = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\**" + _LETTER, re.IGNORECASE)
_BRACKETED = re.compile(r"\((?P<letter>[ab])\)", re.IGNORECASE)


@dataclass(frozen=True)
class _Item:
    number: int
    question: str
    options: Mapping[str, str]
    written: str
    answer: str


@dataclass(frozen=True)
class Mmvp:
    """MMVP over its Questions.csv; rows 2k-1 and 2k are a pair.

    Attributes:
        questions: the CSV file: Index, Question, Options "(a) ... (b) ...", Correct Answer "(a)" or "(b)".
        images: folder of 1.jpg, 2.jpg, ...
        fix_labels: swap the labels of rows 99 and 100 and of 279 and 280, which are known to be wrong. False is the
            official set, which published numbers use.
        prompt: "{}" stands for the question and its options.
        judge: string-match, a .jsonl file of replies (yes or no), or the name of an installed judge.
        max_new_tokens: answers are cut there.
        limit: only the first so many pairs.
    """

    questions: str
    images: str
    fix_labels: bool = False
    prompt: str = "{}"
    judge: str = STRING_MATCH
    max_new_tokens: int = 64
    limit: int | None = None

    source: ClassVar[str] = "MMVP, Tong et al. 2024 (arXiv:2401.06209), section 3; tsb0601/MMVP gpt_grader.py"
    verified: ClassVar[str] = "hand-computed cases; string-match and the judge's prompt are ours, not GPT-4's"

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "mmvp")
        check_limit(self.limit, "mmvp")
        open_judge(self.judge, STRING_MATCH, "mmvp")

    @cached_property
    def _items(self) -> list[_Item]:
        items = []
        for number, row in enumerate(read_csv(self.questions, "mmvp", COLUMNS), start=1):
            where = f"mmvp: {self.questions}: row {number}"
            if row["Index"].strip() != str(number):
                raise DataError(f"{where}: expected Index {number}, found {row['Index']!r}")
            options = _OPTIONS.fullmatch(row["Options"])
            if options is None:
                raise DataError(f"{where}: Options: expected '(a) ... (b) ...', found {row['Options']!r}")
            answer = row["Correct Answer"].strip().lower()
            if answer not in ("(a)", "(b)"):
                raise DataError(f"{where}: Correct Answer: expected (a) or (b), found {row['Correct Answer']!r}")
            items.append(_Item(number, row["Question"], options.groupdict(), row["Options"], answer[1]))
        if len(items) % 2:
            raise DataError(f"mmvp: {self.questions}: expected pairs of rows, found {len(items)} rows")
        return items[: None if self.limit is None else 2 * self.limit]

    @cached_property
    def _answers(self) -> list[str]:
        """The right letter of every row, with the labels that were asked for."""
        letters = [item.answer for item in self._items]
        for first, second in SWAPPED if self.fix_labels else ():
            if second <= len(letters):
                letters[first - 1], letters[second - 1] = letters[second - 1], letters[first - 1]
        return letters

    def ask(self) -> list[Question]:
        """Every question; an id is the row's number, counted from 1."""
        return [
            Question(str(item.number), (str(item.number),), self.prompt.replace("{}", self._text(item)))
            for item in self._items
        ]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """pair_accuracy, n (pairs), ci, answer_accuracy (of single answers) and unknown, under "".

        Raises:
            DataError: a question has no answer, or the judge gives no reply to one.
        """
        right, unknown = self._judge(answers)
        pairs = _pairs(right)
        values = {
            "pair_accuracy": sum(pairs) / len(pairs),
            "n": len(pairs),
            "ci": list(wilson(sum(pairs), len(pairs))),
            "answer_accuracy": sum(right) / len(right),
            "unknown": unknown,
        }
        return {"": values}

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of pair_accuracy: difference, ci (bootstrap paired by pair), p (McNemar, exact)."""
        before, after = _pairs(self._judge(baseline)[0]), _pairs(self._judge(answers)[0])
        ones = [1.0] * len(before)
        change = paired_bootstrap((before, ones), (after, ones)).to_dict()
        return {"": {"pair_accuracy": {**change, "p": mcnemar_exact(before, after)}}}

    def judge_requests(self, answers: Mapping[str, str]) -> list[Request]:
        """What a judge is asked about each answer: is it right, yes or no?"""
        given = answers_in_order([str(item.number) for item in self._items], answers, "mmvp")
        return [
            Request(
                str(item.number),
                f"Question: {self._text(item)}\nRight answer: ({letter})\nGiven answer: {text}\n"
                "Does the given answer choose the right one? Reply with yes or no only.",
            )
            for item, letter, text in zip(self._items, self._answers, given, strict=True)
        ]

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The one card; `labels` says which set of labels."""
        labels = "rows 99/100 and 279/280 corrected" if self.fix_labels else "official"
        more = {"prompt": self.prompt, "judge": self.judge, "labels": labels}
        return {"": card_of(self, [self.questions], len(self._items) // 2, **more)}

    def _text(self, item: _Item) -> str:
        return f"{item.question} {item.written}"

    def _judge(self, answers: Mapping[str, str]) -> tuple[list[bool], int]:
        """Right or wrong per row, and how many answers could not be read."""
        judge = open_judge(self.judge, STRING_MATCH, "mmvp")
        if judge is not None:
            replies = ask_judge(judge, self.judge_requests(answers), "mmvp")
            said = [reply.strip().strip(".").lower() for reply in replies]
            return [one == "yes" for one in said], sum(one not in ("yes", "no") for one in said)
        given = answers_in_order([str(item.number) for item in self._items], answers, "mmvp")
        letters = [read_option(text, item.options) for text, item in zip(given, self._items, strict=True)]
        return [a == b for a, b in zip(letters, self._answers, strict=True)], letters.count(None)


def read_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter an answer chooses, None if none or both: a letter at the start or announced, a bracketed letter, or
    the words of one option and not of the other.

    >>> [read_option(text, {"a": "Open", "b": "Closed"}) for text in ("(b)", "A.", "The answer is (b).", "It is open")]
    ['b', 'a', 'b', 'a']
    """
    for pattern in (_LEADING, _ANNOUNCED):
        match = pattern.match(answer) if pattern is _LEADING else pattern.search(answer)
        if match:
            return match["letter"].lower()
    bracketed = {match["letter"].lower() for match in _BRACKETED.finditer(answer)}
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    said = f" {_words(answer)} "
    named = {letter: _words(option) for letter, option in options.items() if f" {_words(option)} " in said}
    # an option inside the other one ("left", "to the left of it") is not what was chosen
    chosen = [letter for letter, words in named.items() if not any(words in w and words != w for w in named.values())]
    return chosen[0] if len(chosen) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _pairs(right: Sequence[bool]) -> list[bool]:
    return [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
