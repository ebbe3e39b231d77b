"""CHAIR: which objects does a caption name that are not there? (Rohrbach et al. 2018, "Object Hallucination
in Image Captioning").

Needs neither NLTK nor a pickle cache. Scores depend on the list of synonyms, so the protocol card names it
with its hash. Longer captions hallucinate more: read `chair_s` beside `recall` and `length`, or at equal
length with `score_at`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, file_card
from vlm.data.benchmarks._shared.files import check_limit
from vlm.data.benchmarks._shared.objects import COCO, COCO_FILE, Mention, Vocabulary
from vlm.data.benchmarks._shared.statistics import bootstrap_ratio, paired_bootstrap, wilson
from vlm.data.benchmarks._shared.truth import read_truth, truth_files
from vlm.data.benchmarks._shared.words import count_words
from vlm.data.errors import DataError


@dataclass(frozen=True)
class _Judged:
    """One caption: its mentions, which of them are hallucinated, what is there, and its words."""

    mentions: tuple[Mention, ...]
    truth: frozenset[str]
    words: int

    @property
    def wrong(self) -> list[bool]:
        return [mention.object not in self.truth for mention in self.mentions]

    @property
    def named(self) -> frozenset[str]:
        return frozenset(mention.object for mention in self.mentions)


@dataclass(frozen=True)
class Chair:
    """CHAIR over the images of a truth file.

    Attributes:
        truth: COCO annotation file(s), instances and captions, or our plain JSON; several are united.
        images: folder of image files or of shards.
        synonyms: a file in CHAIR's format, or "coco" for our own list.
        prompt: asked for every image.
        max_new_tokens: captions are cut there; 64 and 512 are common and give different numbers.
        limit: so many images, drawn at random.
        seed: of that draw and of the intervals.
    """

    truth: str | Sequence[str]
    images: str
    synonyms: str = COCO
    prompt: str = "Please describe this image in detail."
    max_new_tokens: int = 64
    limit: int | None = None
    seed: int = 0

    source: ClassVar[str] = "CHAIR, Rohrbach et al. 2018 (arXiv:1809.02156), section 3; OPERA chair.py"
    verified: ClassVar[str] = "golden caption and hand-computed cases; own synonyms and singulars, not NLTK's"

    def __post_init__(self) -> None:
        check_limit(self.limit, "chair")

    @property
    def _truth_files(self) -> tuple[str, ...]:
        return truth_files(self.truth)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.read(self.synonyms)

    @cached_property
    def _truth(self) -> dict[str, frozenset[str]]:
        """Image -> objects, for the images that are asked about."""
        truth = read_truth(self._truth_files, self._vocabulary)
        if self.limit is None:
            return truth
        if self.limit > len(truth):
            raise DataError(f"chair: limit {self.limit}, but {self._truth_files[0]} has {len(truth)} images")
        rng = np.random.Generator(np.random.PCG64(self.seed))
        images = list(truth)
        return {images[k]: truth[images[k]] for k in sorted(rng.choice(len(images), self.limit, replace=False))}

    def ask(self) -> list[Question]:
        """The prompt for every image; a question's id is the image's key."""
        return [Question(image, (image,), self.prompt) for image in self._truth]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """chair_s, chair_i, recall, precision, length, by_position, n, ci (of chair_s) and ci_i, under "".

        Raises:
            DataError: an image has no caption.
        """
        return {"": _metrics(self._judge(answers), self.seed)}

    def aliases(self) -> dict[str, str]:
        """COCO's number of an image (42) beside its file name (COCO_val2014_000000000042.jpg)."""
        numbers = {image: re.search(r"(\d+)$", Path(image).stem) for image in self._truth}
        return {str(int(found.group(1))): image for image, found in numbers.items() if found}

    def score_at(self, answers: Mapping[str, str], words: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The same with every caption cut to its first so many words: methods compared at equal length."""
        curve = {}
        for count in words:
            cut = {key: _first_words(text, count) for key, text in answers.items()}
            curve[count] = _metrics(self._judge(cut), self.seed)
        return curve

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of chair_s, chair_i and recall: difference, ci and p (bootstrap paired by image).

        The same under ``<name>_matched`` with both captions of an image cut to the words of the shorter one: what is
        left there does not come from saying less (or more).
        """
        changes: dict[str, Any] = {}
        for suffix, pair in (("", (baseline, answers)), ("_matched", _equally_long(baseline, answers))):
            before, after = (_sums(self._judge(given)) for given in pair)
            for name in ("chair_s", "chair_i", "recall"):
                changes[name + suffix] = paired_bootstrap(before[name], after[name], seed=self.seed).to_dict()
        return {"": changes}

    def mentions(self, question: str, answer: str) -> list[dict[str, Any]]:
        """What an answer names, in order: text, start, end, object, hallucinated. Raises DataError as `truth_of`."""
        truth = self.truth_of(question)
        return [
            {
                "text": mention.text,
                "start": mention.start,
                "end": mention.end,
                "object": mention.object,
                "hallucinated": mention.object not in truth,
            }
            for mention in self._vocabulary.mentions(answer)
        ]

    def truth_of(self, question: str) -> frozenset[str]:
        """What is in the picture of a question, by its id.

        Raises:
            DataError: no such question.
        """
        if question not in self._truth:
            raise DataError(f"chair: image {question!r} is not in {self._truth_files[0]}")
        return self._truth[question]

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The one card."""
        synonyms = COCO_FILE if self.synonyms == COCO else self.synonyms
        card = {
            "benchmark": "chair",
            "prompt": self.prompt,
            "parser": "words: lower case, own singulariser, fixed double words, synonym list",
            "max_new_tokens": self.max_new_tokens,
            "limit": self.limit,
            "seed": self.seed,
            "files": [file_card(path) for path in (*self._truth_files, synonyms)],
            "source": self.source,
            "n": len(self._truth),
        }
        return {"": card}

    def _judge(self, answers: Mapping[str, str]) -> list[_Judged]:
        captions = answers_in_order(list(self._truth), answers, "chair")
        return [
            _Judged(tuple(self._vocabulary.mentions(caption)), truth, count_words(caption))
            for caption, truth in zip(captions, self._truth.values(), strict=True)
        ]


def _equally_long(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Both texts of each key, cut to the words of the shorter one."""
    words = {key: min(count_words(first[key]), count_words(second[key])) for key in first.keys() & second.keys()}
    return tuple({key: _first_words(given[key], n) for key, n in words.items()} for given in (first, second))  # type: ignore[return-value]


def _first_words(text: str, count: int) -> str:
    """The text up to the end of its `count`-th word."""
    ends = [match.end() for match in re.finditer(r"\S+", text) if count_words(match.group())]
    return text if len(ends) <= count else text[: ends[count - 1] if count else 0]


def _sums(judged: Sequence[_Judged]) -> dict[str, tuple[list[float], list[float]]]:
    """What each ratio adds up, per caption: (numerators, denominators)."""
    right = [float(len(one.named & one.truth)) for one in judged]
    return {
        "chair_s": ([float(any(one.wrong)) for one in judged], [1.0] * len(judged)),
        "chair_i": ([float(sum(one.wrong)) for one in judged], [float(len(one.mentions)) for one in judged]),
        "recall": (right, [float(len(one.truth)) for one in judged]),
        "precision": (right, [float(len(one.named)) for one in judged]),
        "length": ([float(one.words) for one in judged], [1.0] * len(judged)),
    }


def _by_position(judged: Sequence[_Judged]) -> dict[str, list]:
    """Share of hallucinated ones among first, second, ... mentions, and how many captions get that far."""
    longest = max((len(one.mentions) for one in judged), default=0)
    columns = [[one.wrong[k] for one in judged if len(one.mentions) > k] for k in range(longest)]
    return {
        "by_position": [sum(column) / len(column) for column in columns],
        "by_position_n": [len(column) for column in columns],
    }


def _metrics(judged: Sequence[_Judged], seed: int) -> dict[str, Any]:
    sums = _sums(judged)
    warnings = [f"{name} has nothing to divide by and is given as 0" for name, (_, low) in sums.items() if not sum(low)]
    return {
        **{name: sum(top) / sum(low) if sum(low) else 0.0 for name, (top, low) in sums.items()},
        "n": len(judged),
        "ci": list(wilson(int(sum(sums["chair_s"][0])), len(judged))),
        "ci_i": list(bootstrap_ratio(*sums["chair_i"], seed=seed)),
        **_by_position(judged),
        "warnings": warnings,
    }
