"""Do You See Me: seven tasks of human visual perception in the plane (Kanade and Ganu 2025, "Do You See Me: A
Multidimensional Benchmark for Evaluating Visual Perception in Multimodal LLMs").

Reads the original's folders or those that `vlm data make doyouseeme` draws with a seed. Counts, letters and numbers of
options are taken out of an answer and must match exactly; the original's scorer is not released, so this one is ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, check_prompt, one_of, read_csv
from vlm.data.benchmarks._shared.numbers import number_in_words
from vlm.data.benchmarks._shared.statistics import rate, rate_change, sum_of_means
from vlm.data.errors import DataError

_OPTION = "Respond as follows: Option <your answer (choose between 1, 2, 3, or 4)>."


def read_count(answer: str) -> str | None:
    """The last whole number of an answer, in digits or else in words.

    >>> [read_count(text) for text in ("3", "In grid 1 there are 2.", "There are seven", "none")]
    ['3', '2', '7', None]
    """
    digits = re.findall(r"\d+", answer)
    words = None if digits else number_in_words(answer)
    return str(int(digits[-1])) if digits else None if words is None else str(words)


def read_option(answer: str) -> str | None:
    """The number after "option", or else the only number from 1 to 4.

    >>> [read_option(text) for text in ("Option <3>", "2.", "1 or 2", "Option 4, not 1")]
    ['3', '2', None, '4']
    """
    named = re.search(r"option\W{0,3}([1-4])\b", answer, re.IGNORECASE)
    if named:
        return named[1]
    numbers = set(re.findall(r"(?<!\d)[1-4](?!\d)", answer))
    return numbers.pop() if len(numbers) == 1 else None


def read_letters(answer: str) -> str | None:
    """The capitals of an answer in order, or the answer itself if it is one word; "I" and "A" before a small word are
    words.

    >>> [read_letters(text) for text in ("T, D and K.", "I see A and B", "The letters are LQW", "abc", "")]
    ['TDK', 'AB', 'LQW', 'ABC', None]
    """
    bare = re.sub(r"\b[IA]\s+(?!and\b|or\b)(?=[a-z])", "", answer)
    capitals = "".join(re.findall(r"\b[A-Z]+\b", bare))
    if capitals:
        return capitals
    return answer.strip().strip(".").upper() if re.fullmatch(r"\s*[A-Za-z]+\.?\s*", answer) else None


@dataclass(frozen=True)
class _Kind:
    """How a dimension is asked where its file has no question, and read."""

    read: Callable[[str], str | None]
    question: str = ""


DIMENSIONS = {
    "visual_spatial": _Kind(read_count),
    "geometric_dataset": _Kind(read_count),
    "color_and_shape_disambiguation": _Kind(read_count),
    "letter_disambiguation": _Kind(
        read_letters,
        "The image shows one or more letters formed by a grid of small squares. What letter(s) can you identify in "
        "this image? Please respond with only the letter(s) you see.",
    ),
    "visual_figure_ground": _Kind(
        read_option,
        "The figure consists of a Target image, which is embedded in some background noise. Out of the four given "
        f"options, your task is to pick the option which has the same figure as the target image. {_OPTION}",
    ),
    "visual_form_constancy": _Kind(
        read_option,
        "The figure consists of a Target image. Out of the four given options, your task is to pick the option which "
        f"has the same figure as the target image. {_OPTION}",
    ),
    "visual_closure": _Kind(
        read_option,
        "The figure consists of a target image which is complete, Out of the four given options (which are partially "
        f"complete), your task is to pick the option which when completed matches the target image. {_OPTION}",
    ),
}


@dataclass(frozen=True)
class _Item:
    id: str
    image: str
    text: str
    answer: str
    dimension: str


@dataclass(frozen=True)
class Doyouseeme:
    """Do You See Me over a folder of its dimensions.

    Attributes:
        images: folder that holds a folder per dimension, each with pictures and dataset_info.csv.
        dimensions: which of them; all that are there when null.
        prompt: "{}" stands for the question.
        max_new_tokens: answers are cut there.
        limit: only the first so many questions of every dimension.
    """

    images: str
    dimensions: Sequence[str] | None = None
    prompt: str = "{}"
    max_new_tokens: int = 32
    limit: int | None = None

    source: ClassVar[str] = "Do You See Me, Kanade and Ganu 2025 (arXiv:2506.02022), section 3; microsoft/Do-You-See-Me"
    verified: ClassVar[str] = (
        "files as released, sweeps re-rendered; the official scorer is not public, this one is ours"
    )

    def __post_init__(self) -> None:
        for dimension in self.dimensions or ():
            one_of(dimension, DIMENSIONS, "doyouseeme: dimension")
        check_prompt(self.prompt, "doyouseeme")
        check_limit(self.limit, "doyouseeme")

    @cached_property
    def _files(self) -> dict[str, Path]:
        there = [name for name in DIMENSIONS if (Path(self.images) / name / "dataset_info.csv").is_file()]
        files = {name: Path(self.images) / name / "dataset_info.csv" for name in self.dimensions or there}
        if not files:
            raise DataError(f"doyouseeme: {self.images}: expected a folder per dimension ({', '.join(DIMENSIONS)})")
        return files

    @cached_property
    def _items(self) -> list[_Item]:
        items = []
        for dimension, path in self._files.items():
            seen: Counter[str] = Counter()
            asked = DIMENSIONS[dimension].question
            columns = ("filename", "answer") if asked else ("filename", "question", "answer")
            for row in read_csv(path, "doyouseeme", columns)[: self.limit]:
                # the original lists some pictures as .svg, which are to be converted
                picture = PurePosixPath(row["filename"]).with_suffix(".png").name
                seen[picture] += 1
                key = f"{dimension}/{PurePosixPath(picture).stem}/{seen[picture]}"
                text = asked or row["question"]
                items.append(_Item(key, f"{dimension}/{picture}", text, row["answer"].strip(), dimension))
        return items

    def ask(self) -> list[Question]:
        """Every question; an id is dimension/picture/number of the question about it, counted from 1."""
        return [
            Question(item.id, (item.image,), self.prompt.replace("{}", item.text), item.dimension)
            for item in self._items
        ]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Per dimension accuracy, n, ci and unread (answers nothing could be taken out of); under "" mean_accuracy over
        the dimensions, with n and ci.

        Raises:
            DataError: a question has no answer.
        """
        read = self._read(answers)
        right, unread = self._by_dimension(self._right(answers)), self._by_dimension([one is None for one in read])
        total = sum_of_means(list(right.values()))
        mean = {
            "mean_accuracy": total.difference / len(right),
            "n": len(read),
            "ci": [bound / len(right) for bound in total.ci],
        }
        return {"": mean} | {name: {**rate(right[name]), "unread": sum(unread[name])} for name in right}

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of accuracy per dimension: difference, ci, p (McNemar, exact)."""
        before, after = (self._by_dimension(self._right(given)) for given in (baseline, answers))
        return {name: {"accuracy": rate_change(before[name], after[name])} for name in before}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every dimension and of the whole."""
        counts = Counter(item.dimension for item in self._items)
        more = {"prompt": self.prompt, "parser": "last number, letters or option, exact match (ours)"}
        cards = {name: card_of(self, [path], counts[name], **more) for name, path in self._files.items()}
        return {"": card_of(self, list(self._files.values()), counts.total(), **more), **cards}

    def _read(self, answers: Mapping[str, str]) -> list[str | None]:
        given = answers_in_order([item.id for item in self._items], answers, "doyouseeme")
        return [DIMENSIONS[item.dimension].read(text) for item, text in zip(self._items, given, strict=True)]

    def _right(self, answers: Mapping[str, str]) -> list[bool]:
        return [one == item.answer for item, one in zip(self._items, self._read(answers), strict=True)]

    def _by_dimension(self, values: Sequence[bool]) -> dict[str, list[bool]]:
        return {
            name: [one for item, one in zip(self._items, values, strict=True) if item.dimension == name]
            for name in self._files
        }
