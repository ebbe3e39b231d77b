"""POPE: is there a ... in the image? (Li et al. 2023, "Evaluating Object Hallucination in Large
Vision-Language Models").

Reads the official files (JSON lines), the SEEM variants (JSON arrays) and LLaVA's joined file (`category`),
whatever the images: COCO, A-OKVQA, GQA, or Scenes. Questions are matched to answers by id and never by line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, file_card
from vlm.data.benchmarks._shared.files import check_limit, check_prompt
from vlm.data.benchmarks._shared.pope_files import PopeItem, check_files, read_splits
from vlm.data.benchmarks._shared.statistics import rate_change
from vlm.data.benchmarks._shared.yes_no import PARSERS, parser_named, yes_no_metrics

_UNSTEADY = "recall differs between splits that share their positive questions: answers are not deterministic"


@dataclass(frozen=True)
class Pope:
    """POPE over one or more question files.

    Attributes:
        questions: question files; a file is a split, named random, popular or adversarial in its name.
        images: folder of image files or of shards.
        prompt: "{}" stands for the question, e.g. "{} Please answer this question with one word." (VCD).
        parser: official, vcd, pai, lmms, vlmeval, exact, mme or first_word.
        max_new_tokens: answers are cut there.
        limit: only the first so many questions of every split.
    """

    questions: Sequence[str]
    images: str
    prompt: str = "{}"
    parser: str = "official"
    max_new_tokens: int = 8
    limit: int | None = None

    source: ClassVar[str] = "POPE, Li et al. 2023 (arXiv:2305.10355), section 5; AoiDragon/POPE evaluate.py"
    verified: ClassVar[str] = "golden answers of the official parser; builder against a restatement of its rules"

    def __post_init__(self) -> None:
        check_files(self.questions, "pope")
        check_prompt(self.prompt, "pope")
        parser_named(self.parser, "pope")
        check_limit(self.limit, "pope")

    @cached_property
    def _splits(self) -> dict[str, list[PopeItem]]:
        """The items of every split, in file order, cut to `limit`."""
        return read_splits(self.questions, self.limit, "pope")

    def ask(self) -> list[Question]:
        """Every question, split by split."""
        return [
            Question(item.id, (item.image,), self.prompt.replace("{}", item.text), item.split)
            for items in self._splits.values()
            for item in items
        ]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Accuracy, precision, recall, f1, yes_ratio, n, ci (of accuracy), unknown and warnings, per split.

        Raises:
            DataError: a question has no answer.
        """
        unknown_is_no = PARSERS[self.parser].unknown_is_no
        scores = {}
        for split, items in self._splits.items():
            predictions = self._predictions(items, answers)
            scores[split] = yes_no_metrics([item.label for item in items], predictions, unknown_is_no=unknown_is_no)
        if self._positives_agree() and recall_spread(scores) > 0:
            for values in scores.values():
                values["warnings"].append(_UNSTEADY)
        return scores

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of accuracy per split: difference, ci (paired bootstrap), p (McNemar, exact)."""
        changes = {}
        for split, items in self._splits.items():
            before, after = (self._correct(items, given) for given in (baseline, answers))
            changes[split] = {"accuracy": rate_change(before, after)}
        return changes

    def labels(self) -> dict[str, str]:
        """The right answer to every question, by id."""
        return {item.id: item.label for items in self._splits.values() for item in items}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every split."""
        card = {
            "benchmark": "pope",
            "prompt": self.prompt,
            "parser": self.parser,
            "max_new_tokens": self.max_new_tokens,
            "limit": self.limit,
            "seed": None,
            "files": [file_card(path) for path in self.questions],
            "source": self.source,
        }
        return {split: {**card, "n": len(items)} for split, items in self._splits.items()}

    def _predictions(self, items: Sequence[PopeItem], answers: Mapping[str, str]) -> list:
        given = answers_in_order([item.id for item in items], answers, "pope")
        read = PARSERS[self.parser].read
        return [read(text, item.label) for text, item in zip(given, items, strict=True)]

    def _correct(self, items: Sequence[PopeItem], answers: Mapping[str, str]) -> list[bool]:
        return [p == item.label for p, item in zip(self._predictions(items, answers), items, strict=True)]

    def _positives_agree(self) -> bool:
        positives = [
            [(item.image, item.text) for item in items if item.label == "yes"] for items in self._splits.values()
        ]
        return all(one == positives[0] for one in positives)


def recall_spread(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Largest minus smallest recall: 0 for a deterministic answerer, since the splits share their positives."""
    recalls = [values["recall"] for values in scores.values()]
    return max(recalls) - min(recalls) if recalls else 0.0
