"""AMBER: descriptions and yes-no questions about existence, attributes and relations (Wang et al. 2023, "AMBER: An
LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation").

The original finds nouns with NLTK and judges likeness with spaCy's large vectors. Here nouns are found by rule
(`_shared/nouns.py`) and words are alike when they are equal or associated, which the card calls AMBER-noW2V;
`similarity` brings word vectors or any other measure back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import (
    check_limit,
    check_prompt,
    need,
    one_of,
    read_json,
    read_records,
    read_text,
    unique,
    yes_no_label,
)
from vlm.data.benchmarks._shared.nouns import known_nouns
from vlm.data.benchmarks._shared.similarity import EXACT, Similarity, open_similarity
from vlm.data.benchmarks._shared.statistics import DRAWS, bootstrap_ratio, paired_bootstrap, rate, rate_change, wilson
from vlm.data.benchmarks._shared.yes_no import Label, Prediction, parser_named
from vlm.data.errors import DataError

ALIKE = 0.8  # two words are alike above this similarity
# the annotation's type -> our groups, from small to large
TYPES = {
    "generative": ("generative",),
    "discriminative-hallucination": ("existence", "discriminative"),
    "discriminative-attribute-state": ("state", "attribute", "discriminative"),
    "discriminative-attribute-number": ("number", "attribute", "discriminative"),
    "discriminative-attribute-action": ("action", "attribute", "discriminative"),
    "discriminative-relation": ("relation", "discriminative"),
    "relation": ("relation", "discriminative"),
}
_GROUPS = ("existence", "attribute", "state", "number", "action", "relation", "discriminative")
_GENERATIVE = {"chair": ("hallucinated", "nouns"), "cover": ("covered", "truths"), "cog": ("hit", "traps")}


@dataclass(frozen=True)
class _Item:
    """A query with its annotation: `truth` and `hallu` of a description, `label` of a yes-no question."""

    id: str
    image: str
    text: str
    groups: tuple[str, ...]
    label: Label = "yes"
    truth: tuple[str, ...] = ()
    hallu: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Judged:
    """Counts of one description: nouns known to AMBER and the hallucinated among them, annotated objects and those
    named, likely hallucinations and those that came."""

    nouns: int
    hallucinated: int
    truths: int
    covered: int
    traps: int
    hit: int


@dataclass(frozen=True)
class Amber:
    """AMBER over a query file; a file with a part of the queries scores that part.

    Attributes:
        queries: query_all.json, query_generative.json or another one of them.
        annotations: annotations.json; a query's id is its place there, counted from 1.
        relations: relation.json, the words associated with each word.
        safe_words: safe_words.txt, words that are never held against a description.
        images: folder of image files or of shards.
        prompt: "{}" stands for the query.
        parser: exact (official: "Yes" or "No", spelt so), first_word or another of POPE's.
        similarity: exact (mode AMBER-noW2V), a .txt or .vec file of word vectors, or the name of an installed function.
        max_new_tokens: answers are cut there.
        limit: only the first so many queries of every annotated type.
    """

    queries: str
    annotations: str
    relations: str
    safe_words: str
    images: str
    prompt: str = "{}"
    parser: str = "exact"
    similarity: str = EXACT
    max_new_tokens: int = 256
    limit: int | None = None

    source: ClassVar[str] = "AMBER, Wang et al. 2023 (arXiv:2311.07397), section 4; junyangwang0410/AMBER inference.py"
    verified: ClassVar[str] = (
        "equal to the official inference.py on its annotations, given the same nouns and equality as similarity; "
        "our nouns and AMBER-noW2V are not NLTK's and spaCy's"
    )

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "amber")
        check_limit(self.limit, "amber")
        parser_named(self.parser, "amber")

    @cached_property
    def _items(self) -> list[_Item]:
        annotations = read_records(self.annotations, "amber", "annotation file")
        items: list[_Item] = []
        asked: Counter[tuple[str, ...]] = Counter()
        for number, record in enumerate(read_records(self.queries, "amber", "query file"), start=1):
            where = f"amber: {self.queries}: query {number}"
            need(record, ("id", "image", "query"), where)
            item = _item(record, annotations, where, self.annotations)
            asked[item.groups] += 1
            if self.limit is None or asked[item.groups] <= self.limit:
                items.append(item)
        unique((item.id for item in items), f"amber: {self.queries}")
        return items

    @cached_property
    def _relations(self) -> dict[str, tuple[str, ...]]:
        content = read_json(self.relations, "amber", "file of related words")
        if not isinstance(content, dict) or not all(isinstance(words, list) for words in content.values()):
            raise DataError(f"amber: {self.relations}: expected an object of lists of words")
        return {word: tuple(words) for word, words in content.items()}

    @cached_property
    def _vocabulary(self) -> frozenset[str]:
        return frozenset(self._relations).union(*self._relations.values())

    @cached_property
    def _safe(self) -> frozenset[str]:
        lines = read_text(self.safe_words, "amber", "file of safe words").splitlines()
        return frozenset(line.strip() for line in lines if line.strip())

    @cached_property
    def _alike(self) -> Similarity | None:
        annotated = {word for item in self._items for word in (*item.truth, *item.hallu)}
        return open_similarity(self.similarity, self._vocabulary | annotated, "amber")

    def ask(self) -> list[Question]:
        """Every query, in the order of the file."""
        return [
            Question(item.id, (item.image,), self.prompt.replace("{}", item.text), item.groups[0])
            for item in self._items
        ]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """generative: chair, cover, hal, cog, n, ci (of chair) and ci_hal; existence, attribute (of state, number,
        action), relation and discriminative: accuracy, precision, recall and f1 of the answer no, n, ci, unknown;
        and, with both, "": amber, their mean, with ci. Fractions; the paper prints per cent.

        Raises:
            DataError: a query has no answer.
        """
        described, said = self._descriptions(answers), self._said(answers)
        scores: dict[str, dict[str, Any]] = {}
        if described:
            scores["generative"] = _generative(described)
        for group in _GROUPS:
            chosen: list[tuple[Label, Prediction]] = [(item.label, one) for item, one in said if group in item.groups]
            if chosen:
                scores[group] = _discriminative(chosen, group)
        if described and said:
            draws = _draws(described, [(item.label, one) for item, one in said])
            low, high = np.quantile(draws, (0.025, 0.975))
            amber = (1 - scores["generative"]["chair"] + scores["discriminative"]["f1"]) / 2
            scores[""] = {"amber": amber, "n": len(self._items), "ci": [float(low), float(high)]}
        return scores

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of chair, cover, cog and hal (bootstrap paired by image) and of each group's accuracy (McNemar)."""
        changes: dict[str, dict[str, Any]] = {}
        before, after = self._descriptions(baseline), self._descriptions(answers)
        if before:
            first, second = _columns(before), _columns(after)
            changes["generative"] = {
                name: paired_bootstrap(first[name], second[name]).to_dict() for name in (*_GENERATIVE, "hal")
            }
        right = [
            (item.groups, old == item.label, new == item.label)
            for (item, old), (_, new) in zip(self._said(baseline), self._said(answers), strict=True)
        ]
        for group in _GROUPS:
            chosen = [(old, new) for groups, old, new in right if group in groups]
            if chosen:
                changes[group] = {"accuracy": rate_change([old for old, _ in chosen], [new for _, new in chosen])}
        return changes

    def labels(self) -> dict[str, str]:
        """The right answer to every yes-no question, by id."""
        return {item.id: item.label for item in self._items if item.groups != ("generative",)}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every group."""
        files = [self.queries, self.annotations]
        counts = Counter(group for item in self._items for group in item.groups)
        cards = {group: card_of(self, files, counts[group], **self._how(group)) for group in counts}
        if {"generative", "discriminative"} <= set(counts):
            both = {**self._how("generative"), **self._how("discriminative")}
            cards[""] = card_of(self, [*files, self.relations, self.safe_words], len(self._items), **both)
        if "generative" in cards:
            cards["generative"] = card_of(
                self, [*files, self.relations, self.safe_words], counts["generative"], **self._how("generative")
            )
        return cards

    def _how(self, group: str) -> dict[str, Any]:
        if group != "generative":
            return {"prompt": self.prompt, "parser": self.parser}
        mode = "AMBER-noW2V" if self.similarity == EXACT else "AMBER"
        return {"prompt": self.prompt, "mode": mode, "similarity": self.similarity, "nouns": "rules, not NLTK"}

    def _answered(self, answers: Mapping[str, str]) -> list[tuple[_Item, str]]:
        given = answers_in_order([item.id for item in self._items], answers, "amber")
        return list(zip(self._items, given, strict=True))

    def _said(self, answers: Mapping[str, str]) -> list[tuple[_Item, Prediction]]:
        read = parser_named(self.parser, "amber").read
        return [
            (item, read(text, item.label)) for item, text in self._answered(answers) if item.groups != ("generative",)
        ]

    def _descriptions(self, answers: Mapping[str, str]) -> list[_Judged]:
        return [self._describe(item, text) for item, text in self._answered(answers) if item.groups == ("generative",)]

    def _describe(self, item: _Item, text: str) -> _Judged:
        """Judge one description, noun by noun, in the order of the official rules."""
        truth, hallu = self._places(item.truth), self._places(item.hallu)
        covered: set[int] = set()
        hit: set[int] = set()
        hallucinated = 0
        nouns = known_nouns(text, self._vocabulary)
        for noun in nouns:
            if noun in self._safe:
                continue
            if noun in truth:
                covered.add(truth[noun])
                continue
            # by likeness a noun may speak of one likely hallucination more than the one it names
            hit |= {place for place in (hallu.get(noun), self._first_alike(noun, hallu)) if place is not None}
            like = self._first_alike(noun, truth)
            if like is None:
                hallucinated += 1
            else:
                covered.add(like)
        return _Judged(len(nouns), hallucinated, len(item.truth), len(covered), len(item.hallu), len(hit))

    def _places(self, words: Sequence[str]) -> dict[str, int]:
        """Word -> which of `words` it speaks of: associated words first, then the words, the first one wins."""
        places: dict[str, int] = {}
        for place, word in enumerate(words):
            for related in self._relations.get(word, ()):
                places.setdefault(related, place)
        for place, word in enumerate(words):
            places.setdefault(word, place)
        return places

    def _first_alike(self, noun: str, places: Mapping[str, int]) -> int | None:
        """Which word is the first that the noun is like; None where none is, or likeness is not asked for."""
        alike = self._alike
        if alike is None:
            return None
        return next((place for word, place in places.items() if alike(noun, word) > ALIKE), None)


def _item(record: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], where: str, file: str) -> _Item:
    """A query with the annotation at its place."""
    number = record["id"]
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= len(annotations):
        raise DataError(f"{where}: id: expected a number from 1 to {len(annotations)}, found {number!r}")
    note, place = annotations[number - 1], f"amber: {file}: annotation {number}"
    need(note, ("id", "type", "truth"), place)
    if note["id"] != number:
        raise DataError(f"{place}: expected the id {number} at this place, found {note['id']!r}")
    groups = TYPES[one_of(str(note["type"]), TYPES, f"{place}: type")]
    common = str(number), record["image"], record["query"], groups
    if groups != ("generative",):
        return _Item(*common, label=yes_no_label(note["truth"], place))
    need(note, ("hallu",), place)
    for key in ("truth", "hallu"):
        if not isinstance(note[key], list) or not all(isinstance(word, str) for word in note[key]):
            raise DataError(f"{place}: {key}: expected a list of words, found {note[key]!r}")
    return _Item(*common, truth=tuple(note["truth"]), hallu=tuple(note["hallu"]))


def _columns(judged: Sequence[_Judged]) -> dict[str, tuple[list[float], list[float]]]:
    """What each ratio adds up, per description: (numerators, denominators)."""
    columns = {
        name: ([float(getattr(one, top)) for one in judged], [float(getattr(one, low)) for one in judged])
        for name, (top, low) in _GENERATIVE.items()
    }
    return columns | {"hal": ([float(one.hallucinated > 0) for one in judged], [1.0] * len(judged))}


def _ratio(top: float, low: float) -> float:
    return top / low if low else 0.0


def _generative(judged: Sequence[_Judged]) -> dict[str, Any]:
    columns = _columns(judged)
    sums = {name: (sum(top), sum(low)) for name, (top, low) in columns.items()}
    return {
        **{name: _ratio(*sums[name]) for name in ("chair", "cover", "hal", "cog")},
        "n": len(judged),
        "ci": list(bootstrap_ratio(*columns["chair"])),
        "ci_hal": list(wilson(int(sums["hal"][0]), len(judged))),
        "warnings": [
            f"{name} has nothing to divide by and is given as 0" for name, (_, low) in sums.items() if not low
        ],
    }


def _discriminative(pairs: Sequence[tuple[Label, Prediction]], group: str) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 of the answer no; F1 with the official small term in its divisor."""
    counts = Counter(pairs)
    caught, said_no = counts["no", "no"], counts["no", "no"] + counts["yes", "no"]
    true_no = sum(count for (label, _), count in counts.items() if label == "no")
    small = 0.001 if group == "existence" else 0.0001
    precision, recall = _ratio(caught, said_no), _ratio(caught, true_no)
    return {
        **rate([label == one for label, one in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + small),
        "unknown": counts["no", "unknown"] + counts["yes", "unknown"],
        "warnings": [
            f"{name} has nothing to divide by and is given as 0"
            for name, low in (("precision", said_no), ("recall", true_no))
            if not low
        ],
    }


def _draws(judged: Sequence[_Judged], pairs: Sequence[tuple[Label, Prediction]]) -> np.ndarray:
    """The AMBER score in bootstrap samples of descriptions and of questions."""
    rng = np.random.Generator(np.random.PCG64(0))
    counts = rng.multinomial(len(judged), np.full(len(judged), 1 / len(judged)), size=DRAWS)
    nouns = counts @ np.array([one.nouns for one in judged])
    wrong = counts @ np.array([one.hallucinated for one in judged])
    chair = np.divide(wrong, nouns, out=np.zeros(DRAWS), where=nouns > 0)
    cells = list(Counter(pairs).items())
    drawn = rng.multinomial(len(pairs), [count / len(pairs) for _, count in cells], size=DRAWS)
    caught, said_no, true_no = (
        drawn @ np.array([float(test(label, one)) for (label, one), _ in cells])
        for test in (
            lambda label, one: label == one == "no",
            lambda label, one: one == "no",
            lambda label, one: label == "no",
        )
    )
    precision = np.divide(caught, said_no, out=np.zeros(DRAWS), where=said_no > 0)
    recall = np.divide(caught, true_no, out=np.zeros(DRAWS), where=true_no > 0)
    return (1 - chair + 2 * precision * recall / (precision + recall + 0.0001)) / 2
