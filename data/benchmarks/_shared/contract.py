"""What a benchmark is: questions about images, a score for the answers, and the protocol behind each number.

A benchmark is one file in `data/benchmarks`, named as in the recipe, with one public frozen dataclass whose
fields are its part of the recipe. It never sees a model: the runner reads the images, asks the questions, and
brings the answers back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from vlm.data.errors import DataError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Question:
    """One prompt about one image, several, or none.

    `id` is unique in the benchmark and the key of its answer; `images` are keys in the image source, in the order in
    which they are shown: where the prompt has `IMAGE_MARK`s, one for each, there, else all before it; `group` is the
    part of the benchmark it is scored in (a POPE split, say), "" if there is only one.
    """

    id: str
    images: tuple[str, ...]
    prompt: str
    group: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.images, str):
            raise DataError(f"question {self.id!r}: images: expected a tuple of keys, found {self.images!r}")
        if self.prompt.count(IMAGE_MARK) not in (0, len(self.images)):
            raise DataError(
                f"question {self.id!r}: expected {len(self.images)} marks {IMAGE_MARK} in the prompt or none, found "
                f"{self.prompt.count(IMAGE_MARK)}"
            )

    def parts(self) -> tuple[str | None, ...]:
        """The prompt in the order it is shown; see `in_order`."""
        return in_order(self.prompt, len(self.images))

    @property
    def image(self) -> str:
        """The key of the only image. Raises DataError where there are none or several."""
        if len(self.images) != 1:
            raise DataError(f"question {self.id!r}: expected one image, found {len(self.images)}")
        return self.images[0]


def in_order(prompt: str, images: int) -> tuple[str | None, ...]:
    """A prompt in the order it is shown: None for each image, text for what lies between; no empty text.

    Images stand at the prompt's marks where it has one for each, else before it.
    """
    if not images or prompt.count(IMAGE_MARK) != images:
        return (*[None] * images, *([prompt] if prompt else []))
    pieces: list[str | None] = []
    for piece in prompt.split(IMAGE_MARK):
        pieces += [None, piece.strip(" ")]
    return tuple(piece for piece in pieces[1:] if piece != "")


@runtime_checkable
class Benchmark(Protocol):
    """The fields and methods the runner relies on.

    `source` names paper and section, `verified` how far our version was compared with the published one.
    `ask` and not `questions`, since a recipe calls its question files that. A benchmark of captions also has
    `mentions(question id, answer)` and `truth_of(question id)`, from which the report draws its pictures. For scoring
    files that something else wrote (`predictions.py`) a benchmark may have `aliases()`, other names of its ids,
    `labels()`, the right answer by id where it is yes or no, and `read_answers(path)` where its official form is none
    that every benchmark takes; with a judge it has `judge_requests(answers)`.
    """

    source: ClassVar[str]
    verified: ClassVar[str]

    @property
    def images(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...

    def ask(self) -> list[Question]:
        """Every question, in the order of the files."""
        ...

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Group -> numbers, each with `n` and `ci` (95 %, of the first number); reported as `<benchmark>_<group>`.

        Rates are fractions, whatever the paper prints.
        """
        ...

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Group -> change of its main numbers from `baseline` to `answers`, tested question by question."""
        ...

    def protocol(self) -> dict[str, dict[str, Any]]:
        """Group -> what it takes to get the same number again: prompt, parser, files with hashes, seed, n."""
        ...


def card_of(benchmark: Benchmark, files: Sequence[str | Path], n: int, **more: Any) -> dict[str, Any]:
    """The part of a protocol card that every benchmark has; `more` comes between its name and its limits."""
    return {
        "benchmark": type(benchmark).__name__.lower(),
        **more,
        "max_new_tokens": benchmark.max_new_tokens,
        "limit": getattr(benchmark, "limit", None),
        "seed": getattr(benchmark, "seed", None),
        "files": [file_card(path) for path in files],
        "source": benchmark.source,
        "n": n,
    }


def file_card(path: str | Path) -> dict[str, str]:
    """Name and sha256 of a file, for a protocol card.

    Raises:
        DataError: no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"benchmark: no file {str(path)!r}")
    return {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def answers_in_order(ids: Sequence[str], answers: Mapping[str, str], benchmark: str) -> list[str]:
    """The answers by question.

    Raises:
        DataError: a question has no answer; a score over some of them would be another number under the same
        name.
    """
    missing = [key for key in ids if key not in answers]
    if missing:
        raise DataError(
            f"{benchmark}: {len(missing)} of {len(ids)} questions have no answer, the first is {missing[0]!r}"
        )
    return [answers[key] for key in ids]
