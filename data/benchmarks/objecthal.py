"""Object HalBench: objects that detailed descriptions make up (Rohrbach et al. 2018, in the version of Yu et al. 2024,
"RLHF-V", section 4.1).

The original has a language model list the objects of each answer and spaCy find their nouns. Here CHAIR's word matcher
does both, on the answer itself, and the card calls it OHB-rule: a path that the official script has too. Each word
counts once per answer. `response_hall` is over the answers that name any COCO object, `chair_s` over all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, check_prompt, need, read_records
from vlm.data.benchmarks._shared.objects import COCO, COCO_FILE, Vocabulary
from vlm.data.benchmarks._shared.predictions import Given
from vlm.data.benchmarks._shared.statistics import bootstrap_ratio, paired_bootstrap, wilson
from vlm.data.benchmarks._shared.truth import read_truth, truth_files
from vlm.data.errors import DataError

SHORT = 3  # an answer of at most so many words describes nothing


@dataclass(frozen=True)
class _Item:
    id: str
    image: str
    text: str


@dataclass(frozen=True)
class _Judged:
    """One answer: the objects its words stand for, one entry per different word, what is there, and its words."""

    named: tuple[str, ...]
    truth: frozenset[str]
    words: int

    @property
    def wrong(self) -> int:
        return sum(name not in self.truth for name in self.named)


@dataclass(frozen=True)
class Objecthal:
    """Object HalBench over its question file.

    Attributes:
        questions: JSON lines with image_id (a number or a key) and question; an image comes with several prompts.
        truth: COCO annotation file(s), instances and captions, or our plain JSON; several are united.
        images: folder of image files or of shards.
        synonyms: a file in CHAIR's format (the benchmark has a refined one), or "coco" for our own list.
        prompt: "{}" stands for the question.
        max_new_tokens: answers are cut there.
        limit: only the first so many questions.
    """

    questions: str
    truth: str | Sequence[str]
    images: str
    synonyms: str = COCO
    prompt: str = "{}"
    max_new_tokens: int = 512
    limit: int | None = None

    source: ClassVar[str] = "Object HalBench in RLHF-V, Yu et al. 2024 (arXiv:2312.00849), section 4.1; its eval folder"
    verified: ClassVar[str] = "hand-computed cases; OHB-rule: no language model, no spaCy, our synonyms and singulars"

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "objecthal")
        check_limit(self.limit, "objecthal")

    @property
    def _truth_files(self) -> tuple[str, ...]:
        return truth_files(self.truth)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.read(self.synonyms)

    @cached_property
    def _truth(self) -> dict[str, frozenset[str]]:
        """Image -> objects, of every image of the truth files."""
        return read_truth(self._truth_files, self._vocabulary)

    @cached_property
    def _items(self) -> list[_Item]:
        items: list[_Item] = []
        seen: Counter[str] = Counter()
        numbers = {digits: image for image in self._truth if (digits := _number(image))}
        for number, record in enumerate(read_records(self.questions, "objecthal", "question file"), start=1):
            where = f"objecthal: {self.questions}: question {number}"
            need(record, ("image_id", "question"), where)
            key = str(record["image_id"])
            image = key if key in self._truth else numbers.get(_number(key))
            if image is None:
                raise DataError(f"{where}: image {key!r} is not in {', '.join(self._truth_files)}")
            seen[key] += 1
            items.append(_Item(f"{key}/{seen[key]}", image, record["question"]))
        return items[: self.limit]

    def ask(self) -> list[Question]:
        """Every question; an id is the image's and the number of the question about it, counted from 1."""
        return [Question(item.id, (item.image,), self.prompt.replace("{}", item.text)) for item in self._items]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """response_hall (CHAIRs_refine) with n (answers that name an object) and ci, object_hall (CHAIRi) with
        ci_object, response_hall_all (CHAIRs, over all answers), object_recall, object_f1, response_f1, length (words),
        answers and warnings, under "".

        Raises:
            DataError: a question has no answer.
        """
        judged = self._judge(answers)
        sums = _sums(judged)
        rates = {name: sum(top) / sum(low) if sum(low) else 0.0 for name, (top, low) in sums.items()}
        naming = int(sum(sums["response_hall"][1]))
        wrong = int(sum(sums["response_hall"][0]))
        values = {
            "response_hall": rates["response_hall"],
            "n": naming,
            "ci": list(wilson(wrong, naming)),
            "object_hall": rates["object_hall"],
            "ci_object": list(bootstrap_ratio(*sums["object_hall"])),
            "response_hall_all": wrong / len(judged),
            "object_recall": rates["object_recall"],
            "object_f1": _harmonic(rates["object_recall"], 1 - rates["object_hall"]),
            "response_f1": _harmonic(naming / len(judged), 1 - rates["response_hall"]),
            "length": sum(one.words for one in judged) / len(judged),
            "answers": len(judged),
            "warnings": [
                f"{name} has nothing to divide by and is given as 0" for name in sums if not sum(sums[name][1])
            ],
        }
        return {"": values}

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of response_hall, object_hall and object_recall: difference, ci and p (paired bootstrap)."""
        before, after = _sums(self._judge(baseline)), _sums(self._judge(answers))
        return {"": {name: paired_bootstrap(before[name], after[name]).to_dict() for name in before}}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The one card."""
        synonyms = COCO_FILE if self.synonyms == COCO else self.synonyms
        files = [self.questions, *self._truth_files, synonyms]
        more = {"prompt": self.prompt, "mode": "OHB-rule", "parser": "CHAIR's word matcher, each word once per answer"}
        return {"": card_of(self, files, len(self._items), **more)}

    def read_answers(self, path: str | Path) -> list[Given] | None:
        """The official form, records with image_id and text or answer: the n-th of an image answers its n-th question.
        None where the records have no image_id."""
        if Path(path).suffix not in (".json", ".jsonl"):
            return None
        records = read_records(path, "objecthal", "file of answers")
        if not all("image_id" in record and record.keys() & {"text", "answer"} for record in records):
            return None
        seen: Counter[str] = Counter()
        given = []
        for number, record in enumerate(records, start=1):
            key = str(record["image_id"])
            seen[key] += 1
            answer = record.get("text", record.get("answer"))
            given.append(Given(f"{key}/{seen[key]}", answer, f"objecthal: {path}: answer {number}"))
        return given

    def _judge(self, answers: Mapping[str, str]) -> list[_Judged]:
        given = answers_in_order([item.id for item in self._items], answers, "objecthal")
        return [
            _Judged(self._named(text), self._truth[item.image], len(text.split()))
            for item, text in zip(self._items, given, strict=True)
        ]

    def _named(self, answer: str) -> tuple[str, ...]:
        if len(answer.split()) <= SHORT:
            return ()
        words = {mention.word: mention.object for mention in self._vocabulary.mentions(answer)}
        return tuple(words.values())


def _number(key: str) -> str:
    """The number at the end of an image's name, without zeros in front: 42 of COCO_val2014_000000000042.jpg."""
    stem = key.rsplit(".", 1)[0] if "." in key else key
    digits = stem[len(stem.rstrip("0123456789")) :]
    return digits.lstrip("0") or digits[-1:]


def _sums(judged: Sequence[_Judged]) -> dict[str, tuple[list[float], list[float]]]:
    """What each ratio adds up, per answer: (numerators, denominators)."""
    return {
        "response_hall": ([float(one.wrong > 0) for one in judged], [float(bool(one.named)) for one in judged]),
        "object_hall": ([float(one.wrong) for one in judged], [float(len(one.named)) for one in judged]),
        "object_recall": (
            [float(len(one.truth.intersection(one.named))) for one in judged],
            [float(len(one.truth)) for one in judged],
        ),
    }


def _harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second else 0.0
