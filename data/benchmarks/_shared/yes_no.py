"""Yes or no: the parsers in circulation and the counts behind POPE's numbers.

The parsers differ, and so do published numbers; a protocol card names the one used. "unknown" means that a
parser refuses to decide: the answer is wrong, and whether it counts as a missed positive is the parser's rule
too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm.data.benchmarks._shared.files import one_of
from vlm.data.benchmarks._shared.statistics import wilson

Label = Literal["yes", "no"]
Prediction = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Parser:
    """`read(answer, label)` decides; only VCD's rule looks at the label. `unknown_is_no`: it counts as a
    missed positive."""

    read: Callable[[str, Label], Prediction]
    unknown_is_no: bool = True


def _official(answer: str, label: Label) -> Prediction:
    """POPE and LLaVA: a "No", "no" or "not" among the words before the first full stop; all else is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _vcd(answer: str, label: Label) -> Prediction:
    """VCD and AGLA: right if the label occurs anywhere, even inside a word ("know" holds a "no")."""
    if label in answer.lower():
        return label
    return "no" if label == "yes" else "yes"


def _pai(answer: str, label: Label) -> Prediction:
    """PAI: as the official one, over the whole answer, with "NO" and contractions such as "isn't"."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    negative = {"No", "not", "no", "NO"} & set(words) or any("n't" in word for word in words)
    return "no" if negative else "yes"


def _lmms(answer: str, label: Label) -> Prediction:
    """lmms-eval: the bare word and nothing else."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else "unknown"


_VLMEVAL_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def _vlmeval_words(answer: str) -> set[str]:
    """VLMEvalKit's words: a mark that touches a blank anywhere vanishes everywhere, others become blanks."""
    text = answer.lower()
    number_comma = re.search(r"\d,\d", text) is not None
    vanishing = {m for m in _VLMEVAL_MARKS if number_comma or f"{m} " in text or f" {m}" in text}
    table = {ord(mark): "" if mark in vanishing else " " for mark in _VLMEVAL_MARKS}
    return set(re.sub(r"\.(?!\d)", "", text.translate(table)).split())


def _vlmeval(answer: str, label: Label) -> Prediction:
    """VLMEvalKit without a judge: one of the two words and not the other."""
    found = _vlmeval_words(answer) & {"yes", "no"}
    if len(found) != 1:
        return "unknown"
    return "yes" if found == {"yes"} else "no"


def _exact(answer: str, label: Label) -> Prediction:
    """AMBER: "Yes" or "No", spelt so, and nothing else."""
    return {"Yes": "yes", "No": "no"}.get(answer, "unknown")  # pyright: ignore[reportReturnType]


def _mme(answer: str, label: Label) -> Prediction:
    """MME: the bare word, or else "yes", then "no", within the first four characters."""
    text = answer.lower()
    if text in ("yes", "no"):
        return text
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "unknown"


def _first_word(answer: str, label: Label) -> Prediction:
    """The first word, whatever marks surround it."""
    word = re.search(r"\w+", answer.lower())
    return word.group() if word and word.group() in ("yes", "no") else "unknown"  # pyright: ignore[reportReturnType]


PARSERS: Mapping[str, Parser] = {
    "official": Parser(_official),
    "vcd": Parser(_vcd),
    "pai": Parser(_pai),
    "lmms": Parser(_lmms, unknown_is_no=False),
    "vlmeval": Parser(_vlmeval),
    "exact": Parser(_exact),
    "mme": Parser(_mme),
    "first_word": Parser(_first_word),
}


def parser_named(name: str, benchmark: str) -> Parser:
    """The parser of that name. Raises DataError where there is none."""
    return PARSERS[one_of(name, PARSERS, f"{benchmark}: parser")]


def _ratio(top: int, bottom: int, name: str, warnings: list[str]) -> float:
    if bottom == 0:
        warnings.append(f"{name} has nothing to divide by and is given as 0")
        return 0.0
    return top / bottom


def yes_no_metrics(
    labels: Sequence[Label], predictions: Sequence[Prediction], *, unknown_is_no: bool = True
) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 (positive = yes), share of predicted yes, n, and accuracy's 95 % interval.

    What the original divides by zero is 0 here, with a line in `warnings`. With `unknown_is_no` false, an
    undecided answer to a positive question is left out of recall (lmms-eval's rule, which flatters it).
    """
    counts = Counter(zip(labels, predictions, strict=True))
    tp, fp = counts["yes", "yes"], counts["no", "yes"]
    missed = counts["yes", "no"] + (counts["yes", "unknown"] if unknown_is_no else 0)
    right, n = tp + counts["no", "no"], len(labels)
    warnings: list[str] = []
    precision = _ratio(tp, tp + fp, "precision", warnings)
    recall = _ratio(tp, tp + missed, "recall", warnings)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "accuracy": _ratio(right, n, "accuracy", warnings),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": _ratio(tp + fp, n, "yes_ratio", warnings),
        "n": n,
        "ci": list(wilson(right, n)),
        "unknown": counts["yes", "unknown"] + counts["no", "unknown"],
        "warnings": warnings,
    }
