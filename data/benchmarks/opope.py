"""OPOPE: POPE's questions put to captions (Chen et al. 2024, "HALC: Object Hallucination Reduction via Adaptive
Focal-Contrast Decoding", section 6).

Every image is described once, and an object counts as affirmed when the description names it. No question is asked, so
no bias towards yes comes in; recall depends on how much a caption says, so the score leans on precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit
from vlm.data.benchmarks._shared.objects import COCO, COCO_FILE, Vocabulary
from vlm.data.benchmarks._shared.pope_files import PopeItem, check_files, read_splits
from vlm.data.benchmarks._shared.statistics import bootstrap_ratio, paired_bootstrap, rate_change
from vlm.data.benchmarks._shared.yes_no import Prediction, yes_no_metrics
from vlm.data.errors import DataError


@dataclass(frozen=True)
class Opope:
    """OPOPE over one or more of POPE's question files.

    Attributes:
        questions: POPE's files; a file is a split, named random, popular or adversarial in its name.
        images: folder of image files or of shards.
        synonyms: a file in CHAIR's format, or "coco" for our own list; it must know the objects asked for.
        prompt: asked for every image.
        beta: weight of recall in f_beta; 0.2 is reported for HALC.
        max_new_tokens: captions are cut there.
        limit: only the first so many questions of every split.
    """

    questions: Sequence[str]
    images: str
    synonyms: str = COCO
    prompt: str = "Please describe this image in detail."
    beta: float = 0.2
    max_new_tokens: int = 64
    limit: int | None = None

    source: ClassVar[str] = "OPOPE, Chen et al. 2024 (arXiv:2403.00425), section 6; POPE's files, CHAIR's matcher"
    verified: ClassVar[str] = "hand-computed cases; beta 0.2 unverified, the released script prints plain F1"

    def __post_init__(self) -> None:
        check_files(self.questions, "opope")
        check_limit(self.limit, "opope")
        if not self.beta > 0:
            raise DataError(f"opope: beta: expected a positive number, found {self.beta}")

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.read(self.synonyms)

    @cached_property
    def _splits(self) -> dict[str, list[tuple[PopeItem, str]]]:
        """The items of every split, each with the object it asks for."""
        splits = read_splits(self.questions, self.limit, "opope")
        return {split: [(item, self._object(item)) for item in items] for split, items in splits.items()}

    def _object(self, item: PopeItem) -> str:
        found = [mention.object for mention in self._vocabulary.mentions(item.text)]
        if len(found) != 1:
            raise DataError(
                f"opope: question {item.id} {item.text!r}: expected one object of {self._vocabulary.source}, found "
                f"{', '.join(found) or 'none'}"
            )
        return found[0]

    @cached_property
    def _images(self) -> list[str]:
        return list(dict.fromkeys(item.image for items in self._splits.values() for item, _ in items))

    def ask(self) -> list[Question]:
        """The prompt for every image; a question's id is the image's key."""
        return [Question(image, (image,), self.prompt) for image in self._images]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """As POPE per split (accuracy, precision, recall, f1, yes_ratio, n, ci of accuracy), with f_beta and
        ci_precision.

        Raises:
            DataError: an image has no caption.
        """
        scores = {}
        for split, said in self._said(answers).items():
            values = yes_no_metrics([item.label for item, _ in said], [one for _, one in said])
            values["f_beta"] = _f_beta(values["precision"], values["recall"], self.beta)
            values["ci_precision"] = list(bootstrap_ratio(*_precision(said)))
            scores[split] = values
        return scores

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of accuracy (McNemar) and of precision (paired bootstrap) per split."""
        changes = {}
        before, after = self._said(baseline), self._said(answers)
        for split in before:
            right = [[one == item.label for item, one in said[split]] for said in (before, after)]
            precision = paired_bootstrap(_precision(before[split]), _precision(after[split]))
            changes[split] = {"accuracy": rate_change(*right), "precision": precision.to_dict()}
        return changes

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every split."""
        synonyms = COCO_FILE if self.synonyms == COCO else self.synonyms
        more = {"prompt": self.prompt, "parser": "yes if the caption names the object", "beta": self.beta}
        return {
            split: card_of(self, [*self.questions, synonyms], len(items), **more)
            for split, items in self._splits.items()
        }

    def _said(self, answers: Mapping[str, str]) -> dict[str, list[tuple[PopeItem, Prediction]]]:
        """What the captions say to every question, by split."""
        captions = answers_in_order(self._images, answers, "opope")
        named = {
            image: {mention.object for mention in self._vocabulary.mentions(caption)}
            for image, caption in zip(self._images, captions, strict=True)
        }
        return {
            split: [(item, "yes" if name in named[item.image] else "no") for item, name in items]
            for split, items in self._splits.items()
        }


def _precision(said: Sequence[tuple[PopeItem, Prediction]]) -> tuple[list[float], list[float]]:
    """What precision adds up, per question: (right and affirmed, affirmed)."""
    affirmed = [float(one == "yes") for _, one in said]
    return [a * (item.label == "yes") for a, (item, _) in zip(affirmed, said, strict=True)], affirmed


def _f_beta(precision: float, recall: float, beta: float) -> float:
    low = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / low if low else 0.0
