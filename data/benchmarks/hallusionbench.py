"""HallusionBench: is a wrong answer the language's fault or the eye's? (Guan et al. 2024, "HallusionBench: An Advanced
Diagnostic Suite for Entangled Language Hallucination and Visual Illusion in Large Vision-Language Models").

The same question is asked of an original image and of edited ones (VD), or without an image, with it and with an edited
one (VS). What an answer changes to tells language hallucination (LH), visual illusion (VI) and a mixture apart.
Published numbers come from a language model as judge; "string-match" reads yes or no by rule and is called so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.benchmarks._shared.contract import Question, answers_in_order, card_of
from vlm.data.benchmarks._shared.files import check_limit, check_prompt, need, one_of, read_records, unique
from vlm.data.benchmarks._shared.judge import Request, ask_judge, open_judge
from vlm.data.benchmarks._shared.predictions import Given
from vlm.data.benchmarks._shared.statistics import mcnemar_exact, paired_bootstrap, rate, rate_change
from vlm.data.benchmarks._shared.yes_no import Label, parser_named
from vlm.data.errors import DataError

STRING_MATCH = "string-match"
WRONG, RIGHT, UNCLEAR = 0, 1, 2
_KEYS = (
    "category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer",
    "gt_answer_details", "filename",
)  # fmt: skip

_PLACE = ("category", "subcategory", "set_id", "figure_id", "question_id")


@dataclass(frozen=True)
class _Item:
    category: str
    subcategory: str
    visual_input: str
    set: str
    figure: str
    question: str
    text: str
    label: Label
    details: str
    file: str | None

    @property
    def id(self) -> str:
        return "/".join((self.category, self.subcategory, self.set, self.figure, self.question))

    @property
    def same_question(self) -> tuple[str, ...]:
        return self.category, self.subcategory, self.set, self.question

    @property
    def same_figure(self) -> tuple[str, ...]:
        return self.category, self.subcategory, self.set, self.figure

    @property
    def is_blind(self) -> bool:
        """Asked without an image, where not to know is right."""
        return self.category == "VS" and self.figure == "0"


@dataclass(frozen=True)
class _Verdict:
    """What a judge says of an answer: WRONG, RIGHT or UNCLEAR, and whether it agrees with the answer to figure 0."""

    code: int
    same: bool


@dataclass(frozen=True)
class Hallusionbench:
    """HallusionBench over its question file.

    Attributes:
        questions: HallusionBench.json.
        images: folder that holds VD/ and VS/.
        prompt: "{}" stands for the question.
        judge: string-match, a .jsonl file of replies, or the name of an installed judge.
        parser: how string-match reads yes or no: vlmeval (one of the words and not the other) or another of POPE's.
        max_new_tokens: answers are cut there.
        limit: only the first so many sets (questions about one original image and what was made of it).
    """

    questions: str
    images: str
    prompt: str = "{}"
    judge: str = STRING_MATCH
    parser: str = "vlmeval"
    max_new_tokens: int = 64
    limit: int | None = None

    source: ClassVar[str] = "HallusionBench, Guan et al. 2024 (arXiv:2310.14566), section 4; its utils.py"
    verified: ClassVar[str] = (
        "equal to the official utils.py on its question file with random verdicts; string-match and the judge's "
        "prompts are ours, not the official GPT-4"
    )

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "hallusionbench")
        check_limit(self.limit, "hallusionbench")
        parser_named(self.parser, "hallusionbench")
        open_judge(self.judge, STRING_MATCH, "hallusionbench")

    @cached_property
    def _items(self) -> list[_Item]:
        records = read_records(self.questions, "hallusionbench", "question file")
        items = [
            _item(record, f"hallusionbench: {self.questions}: question {number}")
            for number, record in enumerate(records, start=1)
        ]
        sets = list(dict.fromkeys(item.same_question[:3] for item in items))[: self.limit]
        items = [item for item in items if item.same_question[:3] in sets]
        unique((item.id for item in items), f"hallusionbench: {self.questions}")
        originals = {item.same_question for item in items if item.figure == "0"}
        for item in items:
            if item.same_question not in originals:
                raise DataError(f"hallusionbench: {self.questions}: {item.id}: its question is not asked of figure 0")
        return items

    def ask(self) -> list[Question]:
        """Every question; an id is category/subcategory/set/figure/question. Those without an image have none."""
        return [
            Question(
                item.id,
                () if item.file is None else (item.file,),
                self.prompt.replace("{}", item.text),
                item.category,
            )
            for item in self._items
        ]

    def score(self, answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Numbers of all questions under "", and of each category (VD, VS).

        accuracy (aAcc) with n and ci; question_accuracy (qAcc: all figures of a question right) and figure_accuracy
        (fAcc: all questions of a figure right; not of figures without image), easy_accuracy and hard_accuracy (qAcc
        over unedited and over edited figures); language_hallucination, visual_illusion and mixed (shares of the
        diagnosed questions); yes_bias (predicted minus true share of yes) and false_positives (share of yes among the
        wrong); unknown.

        Raises:
            DataError: a question has no answer, or the judge gives no reply.
        """
        pairs = list(zip(self._items, self._judge(answers), strict=True))
        scores = {"": _metrics(pairs)}
        for category in dict.fromkeys(item.category for item in self._items):
            scores[category] = _metrics([pair for pair in pairs if pair[0].category == category])
        return scores

    def compare(self, baseline: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Change of accuracy, question_accuracy and figure_accuracy: difference, ci, p (McNemar, exact)."""
        before, after = (
            [(item, verdict) for item, verdict in zip(self._items, self._judge(given), strict=True)]
            for given in (baseline, answers)
        )
        changes = {"accuracy": rate_change([_right(*pair) for pair in before], [_right(*pair) for pair in after])}
        for name, groups in (("question_accuracy", _question_groups), ("figure_accuracy", _figure_groups)):
            first, second = groups(before), groups(after)
            ones = [1.0] * len(first)
            change = paired_bootstrap((first, ones), (second, ones)).to_dict()
            changes[name] = {**change, "p": mcnemar_exact(first, second)}
        return {"": changes}

    def judge_requests(self, answers: Mapping[str, str]) -> list[Request]:
        """Two for each answer: `<id>#right`, does it agree with the reference (correct, incorrect, unclear), and
        `<id>#same`, does it agree with the answer to figure 0 (same, different)."""
        given = dict(zip([i.id for i in self._items], self._given(answers), strict=True))
        originals = {item.same_question: given[item.id] for item in self._items if item.figure == "0"}
        right = [
            Request(
                f"{item.id}#right",
                f"Question: {item.text}\nReference: {item.details}\nAnswer: {given[item.id]}\n"
                "Compare the answer with the reference. Reply with one word: correct if they agree, incorrect if they "
                "contradict each other, unclear if the answer does not commit itself.",
            )
            for item in self._items
        ]
        same = [
            Request(
                f"{item.id}#same",
                f"First answer: {given[item.id]}\nSecond answer: {originals[item.same_question]}\n"
                "Could both answers be true of one situation? Reply with one word: same if so, different if they "
                "contradict each other.",
            )
            for item in self._items
        ]
        return [*right, *same]

    def protocol(self) -> dict[str, dict[str, Any]]:
        """The card of every group."""
        counts = Counter(item.category for item in self._items)
        more = {"prompt": self.prompt, "judge": self.judge}
        if self.judge == STRING_MATCH:
            more["parser"] = self.parser
        return {
            group: card_of(self, [self.questions], n, **more) for group, n in {"": counts.total(), **counts}.items()
        }

    def read_answers(self, path: str | Path) -> list[Given] | None:
        """The official form, the question file with model_prediction in every record; None where it is another one."""
        if Path(path).suffix != ".json":
            return None
        records = read_records(path, "hallusionbench", "file of answers")
        if not all({"category", "model_prediction"} <= record.keys() for record in records):
            return None
        given = []
        for number, record in enumerate(records, start=1):
            where = f"hallusionbench: {path}: answer {number}"
            need(record, _PLACE, where)
            given.append(Given("/".join(str(record[key]) for key in _PLACE), record["model_prediction"], where))
        return given

    def _given(self, answers: Mapping[str, str]) -> list[str]:
        return answers_in_order([item.id for item in self._items], answers, "hallusionbench")

    def _judge(self, answers: Mapping[str, str]) -> list[_Verdict]:
        judge = open_judge(self.judge, STRING_MATCH, "hallusionbench")
        if judge is not None:
            replies = ask_judge(judge, self.judge_requests(answers), "hallusionbench")
            half = len(self._items)
            return [
                _Verdict(_code(right), "same" in same.lower())
                for right, same in zip(replies[:half], replies[half:], strict=True)
            ]
        read = parser_named(self.parser, "hallusionbench").read
        said = [read(text, item.label) for text, item in zip(self._given(answers), self._items, strict=True)]
        originals = {i.same_question: one for i, one in zip(self._items, said, strict=True) if i.figure == "0"}
        return [
            _Verdict(UNCLEAR if one == "unknown" else int(one == item.label), one == originals[item.same_question])
            for item, one in zip(self._items, said, strict=True)
        ]


def _item(record: Mapping[str, Any], where: str) -> _Item:
    need(record, _KEYS, where)
    one_of(str(record["category"]), ("VD", "VS"), f"{where}: category")
    one_of(str(record["visual_input"]), ("0", "1", "2"), f"{where}: visual_input")
    answer = one_of(str(record["gt_answer"]), ("0", "1"), f"{where}: gt_answer")
    file = record["filename"]
    if (file is None) != (str(record["visual_input"]) == "0"):
        raise DataError(f"{where}: expected a filename exactly where visual_input is not 0, found {file!r}")
    return _Item(
        str(record["category"]),
        str(record["subcategory"]),
        str(record["visual_input"]),
        str(record["set_id"]),
        str(record["figure_id"]),
        str(record["question_id"]),
        record["question"],
        "yes" if answer == "1" else "no",
        record["gt_answer_details"],
        None if file is None else str(file).removeprefix("./"),
    )


def _code(reply: str) -> int:
    """ "incorrect" holds a "correct", so it is looked for first."""
    text = reply.lower()
    return WRONG if "incorrect" in text else RIGHT if "correct" in text else UNCLEAR


def _right(item: _Item, verdict: _Verdict) -> bool:
    return verdict.code == RIGHT or (item.is_blind and verdict.code == UNCLEAR)


_Pairs = Sequence[tuple[_Item, _Verdict]]


def _all_right(groups: Iterable[tuple[tuple[str, ...], bool]]) -> list[bool]:
    """Per group, in order of first appearance: are all of its members right?"""
    found: dict[tuple[str, ...], bool] = {}
    for group, right in groups:
        found[group] = found.get(group, True) and right
    return list(found.values())


def _question_groups(pairs: _Pairs) -> list[bool]:
    return _all_right((item.same_question, _right(item, verdict)) for item, verdict in pairs)


def _figure_groups(pairs: _Pairs) -> list[bool]:
    return _all_right((item.same_figure, _right(item, verdict)) for item, verdict in pairs if not item.is_blind)


def diagnose(category: str, visual_input: str, is_original: bool, original: int, code: int, same: bool) -> str | None:
    """What a wrong or unclear answer shows: "LH", "VI", "Mixed", or None where nothing is wrong.

    Args:
        category: VD (the question needs the image) or VS (the image supplements what is known).
        visual_input: 0 no image, 1 original, 2 edited.
        is_original: asked of figure 0.
        original: verdict on the answer to figure 0: 0 wrong, 1 right, 2 unclear; `code`: verdict on this one.
        same: whether this answer agrees with the one to figure 0.
    """
    if code == RIGHT:
        return None
    if category == "VD":
        stuck = not is_original and original == RIGHT and code == WRONG and same
        return "Mixed" if stuck else "VI"
    if is_original:
        return "LH" if code == WRONG else None
    if original == WRONG:
        return "LH" if code == WRONG and same else "Mixed"
    stuck = original == RIGHT and code == WRONG and visual_input == "2" and same
    return "LH" if stuck else "VI"


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def _metrics(pairs: _Pairs) -> dict[str, Any]:
    originals = {item.same_question: verdict.code for item, verdict in pairs if item.figure == "0"}
    right = [_right(item, verdict) for item, verdict in pairs]
    truth = [item.label == "yes" for item, _ in pairs]
    # as the official script has it: who is right said the truth, who is wrong its opposite
    said = [good == yes for good, yes in zip(right, truth, strict=True)]
    wrong = [yes for good, yes in zip(right, truth, strict=True) if not good]
    causes = Counter(
        diagnose(
            item.category,
            item.visual_input,
            item.figure == "0",
            originals[item.same_question],
            verdict.code,
            verdict.same,
        )
        for item, verdict in pairs
    )
    diagnosed = causes["LH"] + causes["VI"] + causes["Mixed"]
    return {
        **rate(right),
        "question_accuracy": _share(_question_groups(pairs)),
        "figure_accuracy": _share(_figure_groups(pairs)),
        "easy_accuracy": _share(_question_groups([pair for pair in pairs if pair[0].visual_input != "2"])),
        "hard_accuracy": _share(_question_groups([pair for pair in pairs if pair[0].visual_input == "2"])),
        "language_hallucination": causes["LH"] / diagnosed if diagnosed else 0.0,
        "visual_illusion": causes["VI"] / diagnosed if diagnosed else 0.0,
        "mixed": causes["Mixed"] / diagnosed if diagnosed else 0.0,
        "yes_bias": _share(said) - _share(truth),
        "false_positives": 1 - _share(wrong) if wrong else 0.0,
        "unknown": sum(verdict.code == UNCLEAR for _, verdict in pairs),
    }
