"""Image classification: is the best class one of the picture's? It judges an encoder alone, by the head that the last
stage trained (``objective: classify``).

Pictures may have several labels: the best class is right if it is one of them, as in ImageNet-ReaL (Beyer et al. 2020,
"Are we done with ImageNet?", section 3). With one label to a picture this is plain accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, read_json
from vlm.data.benchmarks._shared.statistics import mcnemar_exact, paired_bootstrap, wilson
from vlm.data.errors import DataError

FIVE = 5


@dataclass(frozen=True)
class Classification:
    """Top-1 and top-5 accuracy of a trained head.

    Attributes:
        truth: JSON file, image key -> its class or a list of its classes.
        images: folder of image files or of shards.
        limit: only the first so many pictures.
    """

    truth: str
    images: str
    limit: int | None = None

    source: ClassVar[str] = "top-1 and top-5: ILSVRC; several labels: ReaL (arXiv 2006.07159), section 3"
    verified: ClassVar[str] = "definition; hand-computed cases"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_limit(self.limit, "classification")

    @property
    def max_new_tokens(self) -> int:
        """A head says no words."""
        return 0

    @cached_property
    def _truth(self) -> dict[str, frozenset[str]]:
        content = read_json(self.truth, "classification", "truth file")
        if not isinstance(content, dict) or not content:
            raise DataError(f"classification: {self.truth}: expected an object of images and their classes")
        found: dict[str, frozenset[str]] = {}
        for image, classes in list(content.items())[: self.limit]:
            named = [classes] if isinstance(classes, str) else classes
            if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
                raise DataError(
                    f"classification: {self.truth}: image {image!r}: expected a class or a list of classes, "
                    f"found {classes!r}"
                )
            found[image] = frozenset(map(_plain, named))
        return found

    def ask(self) -> list[Question]:
        """Every picture without words; a question's id is the image's key."""
        return [Question(image, (image,), "") for image in self._truth]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """top1, n, ci (of top1), top5 and ci_5, under "". An answer is one class to a line, the best first.

        Raises:
            DataError: a picture has no answer.
        """
        first, five = self._right(answers, 1), self._right(answers, FIVE)
        n = len(first)
        values = {
            "top1": sum(first) / n,
            "n": n,
            "ci": list(wilson(sum(first), n)),
            "top5": sum(five) / n,
            "ci_5": list(wilson(sum(five), n)),
        }
        return {"": values}

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of top1: difference, ci (bootstrap paired by picture), p (McNemar, exact)."""
        before, after = self._right(baseline, 1), self._right(answers, 1)
        ones = [1.0] * len(before)
        change = paired_bootstrap((before, ones), (after, ones)).to_dict()
        return {"": {"top1": {**change, "p": mcnemar_exact(before, after)}}}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The one card."""
        several = sum(len(classes) > 1 for classes in self._truth.values())
        more = {"prompt": "", "labels": f"{several} of {len(self._truth)} pictures have several; any of them is right"}
        return {"": card_of(self, [self.truth], len(self._truth), **more)}

    def _right(self, answers: Mapping[str, str], count: int) -> list[bool]:
        given = answers_in_order(list(self._truth), answers, "classification")
        return [
            any(_plain(name) in classes for name in answer.splitlines()[:count])
            for answer, classes in zip(given, self._truth.values(), strict=True)
        ]


def _plain(name: str) -> str:
    return " ".join(name.lower().split())
