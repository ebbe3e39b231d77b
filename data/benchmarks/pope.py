"""POPE: is there a ... in the image? (Li et al. 2023, "Evaluating Object Hallucination in Large
Vision-Language Models").

Reads the official files (JSON lines), the SEEM variants (JSON arrays) and LLaVA's joined file (`category`),
whatever the images: COCO, A-OKVQA, GQA, or Scenes. Questions are matched to answers by id and never by line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, file_card
from vlm.data.benchmarks._shared.pope_builder import SPLITS
from vlm.data.benchmarks._shared.statistics import mcnemar_exact, paired_bootstrap
from vlm.data.benchmarks._shared.yes_no import PARSERS, Label, yes_no_metrics
from vlm.data.errors import DataError

_UNSTEADY = "recall differs between splits that share their positive questions: answers are not deterministic"


@dataclass(frozen=True)
class _Item:
    id: str
    image: str
    text: str
    label: Label
    split: str


@dataclass(frozen=True)
class Pope:
    """POPE over one or more question files.

    Attributes:
        questions: question files; a file is a split, named random, popular or adversarial in its name.
        images: folder of image files or of shards.
        prompt: "{}" stands for the question, e.g. "{} Please answer this question with one word." (VCD).
        parser: official, vcd, pai, lmms or vlmeval.
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
        if isinstance(self.questions, str) or not self.questions:
            raise DataError(f"pope: questions: expected a list of files, found {self.questions!r}")
        if self.prompt.count("{}") != 1:
            raise DataError(f"pope: prompt: expected one {{}} for the question, found {self.prompt!r}")
        if self.parser not in PARSERS:
            near = difflib.get_close_matches(self.parser, PARSERS, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise DataError(f"pope: parser {self.parser!r} is none of {', '.join(PARSERS)}{hint}")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"pope: limit: expected a positive number or null, found {self.limit}")

    @cached_property
    def _splits(self) -> dict[str, list[_Item]]:
        """The items of every split, in file order, cut to `limit`."""
        splits: dict[str, list[_Item]] = {}
        for path in self.questions:
            for item in _read(path):
                splits.setdefault(item.split, []).append(item)
        for split, items in splits.items():
            if len({item.id for item in items}) != len(items):
                raise DataError(f"pope: split {split!r} has a question_id twice in {list(self.questions)}")
        return {split: items[: self.limit] for split, items in splits.items()}

    def ask(self) -> list[Question]:
        """Every question, split by split."""
        return [
            Question(item.id, item.image, self.prompt.replace("{}", item.text), item.split)
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
            ones = [1.0] * len(items)
            change = paired_bootstrap((before, ones), (after, ones)).to_dict()
            changes[split] = {"accuracy": {**change, "p": mcnemar_exact(before, after)}}
        return changes

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

    def _predictions(self, items: Sequence[_Item], answers: Mapping[str, str]) -> list:
        given = answers_in_order([item.id for item in items], answers, "pope")
        read = PARSERS[self.parser].read
        return [read(text, item.label) for text, item in zip(given, items, strict=True)]

    def _correct(self, items: Sequence[_Item], answers: Mapping[str, str]) -> list[bool]:
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


def _split_of(path: str, record: Mapping[str, Any]) -> str:
    if "category" in record:
        return str(record["category"])
    stem = Path(path).stem
    return next((split for split in SPLITS if split in stem), stem)


def _records(path: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines or JSON-array file."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"pope: no question file {path!r}")
    text = file.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"pope: {path}: neither JSON lines nor a JSON array: {error}") from error


def _read(path: str) -> list[_Item]:
    items = []
    records = _records(path)
    if not records:
        raise DataError(f"pope: {path}: no questions")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"pope: {path}: question {number}: expected an object, found {record!r}")
        missing = [key for key in ("question_id", "image", "text", "label") if key not in record]
        if missing:
            raise DataError(f"pope: {path}: question {number} lacks {', '.join(missing)}; found {', '.join(record)}")
        label = str(record["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"pope: {path}: question {number}: label {record['label']!r} is neither yes nor no")
        split = _split_of(path, record)
        items.append(_Item(f"{split}/{record['question_id']}", record["image"], record["text"], label, split))
    return items
