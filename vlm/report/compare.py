"""What can be compared between two results, and whether a difference is more than chance.

Where the evaluation compared the two item by item (``change``), its paired interval decides. Else each judged number
comes with a confidence interval of its own, and the interval of the difference follows from the two by
square-and-add (Newcombe, Statistics in Medicine 17, 1998, method 10): a difference d = b - a of a in [la, ua] and
b in [lb, ub] lies in [d - hypot(b - lb, ua - a), d + hypot(ub - b, a - la)]. Both results answer the same questions,
so their errors mostly go together and this interval is, if anything, too wide: it rather misses a small effect than
claims one that is not there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import hypot
from typing import Literal

from vlm.report.records import Chair, Change, Interval, Result, YesNo

Verdict = Literal["helps", "hurts", "same"]


@dataclass(frozen=True)
class Quantity:
    """One number of a benchmark: ``better`` is +1 when more is better, -1 when less is, 0 when neither."""

    benchmark: str
    field: str
    title: str
    better: int = 0
    interval_field: str = ""

    def of(self, result: Result) -> float | None:
        value = getattr(result.metrics.get(self.benchmark), self.field, None)
        return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)

    def interval(self, result: Result) -> Interval | None:
        return getattr(result.metrics.get(self.benchmark), self.interval_field or "-", None)

    def change(self, result: Result) -> Change | None:
        return result.change.get(self.benchmark, {}).get(self.field)

    @property
    def is_rate(self) -> bool:
        return self.field != "length"


@dataclass(frozen=True)
class Difference:
    """``value`` = method - plain, in [low, high] with the confidence of the two intervals it was made from."""

    before: float
    after: float
    low: float
    high: float
    verdict: Verdict

    @property
    def value(self) -> float:
        return self.after - self.before


YES_NO = (Quantity("", "accuracy", "accuracy", 1, "ci"), Quantity("", "f1", "F1", 1))
CHAIR = (
    Quantity("", "chair_s", "CHAIRs", -1, "ci"),
    Quantity("", "chair_i", "CHAIRi", -1, "ci_i"),
    Quantity("", "recall", "recall", 1),
    Quantity("", "length", "length", 0),
)


def benchmarks(results: Iterable[Result]) -> dict[str, YesNo | Chair | None]:
    """The benchmarks of all results in the order they first appear, each with one example of its scores."""
    found: dict[str, YesNo | Chair | None] = {}
    for result in results:
        for name, scores in result.metrics.items():
            found.setdefault(name, scores if isinstance(scores, YesNo | Chair) else None)
    return found


def quantities(results: tuple[Result, ...], benchmark: str) -> list[Quantity]:
    """The numbers of one benchmark that the table shows."""
    kind = benchmarks(results)[benchmark]
    if kind is None:
        fields = dict.fromkeys(
            key for result in results if (other := result.metrics.get(benchmark)) for key in other.model_extra or {}
        )
        shown = [Quantity(benchmark, key, key.replace("_", " ")) for key in fields]
    else:
        shown = [replace(row, benchmark=benchmark) for row in (YES_NO if isinstance(kind, YesNo) else CHAIR)]
    return [quantity for quantity in shown if any(quantity.of(result) is not None for result in results)]


def judged(results: tuple[Result, ...]) -> list[Quantity]:
    """The numbers that have an interval and a direction: those of which a method can be said to help or hurt."""
    every = [quantity for name in benchmarks(results) for quantity in quantities(results, name)]
    return [q for q in every if q.better and any(q.interval(result) or q.change(result) for result in results)]


def difference(quantity: Quantity, plain: Result, method: Result) -> Difference | None:
    """The change of ``quantity`` against plain, or None where a value or every interval is missing."""
    a, b = quantity.of(plain), quantity.of(method)
    interval_a, interval_b, paired = quantity.interval(plain), quantity.interval(method), quantity.change(method)
    if a is None or b is None:
        return None
    if paired is not None:
        low, high = paired.ci
    elif interval_a is not None and interval_b is not None:
        low = b - a - hypot(b - interval_b[0], interval_a[1] - a)
        high = b - a + hypot(interval_b[1] - b, a - interval_a[0])
    else:
        return None
    return Difference(a, b, low, high, _verdict(low * quantity.better, high * quantity.better))


def _verdict(one: float, other: float) -> Verdict:
    """From the two ends of an interval whose positive side is the better one."""
    if min(one, other) > 0:
        return "helps"
    return "hurts" if max(one, other) < 0 else "same"


def title(benchmark: str, others: Iterable[str] = ()) -> str:
    """``pope_random`` as ``POPE random``; plain ``chair`` is of ordinary scenes when there are counterfactual ones."""
    first, *rest = benchmark.split("_")
    words = [first.upper() if first in ("pope", "chair", "mme", "amber") else first, *rest]
    if rest == [] and f"{benchmark}_counterfactual" in others:
        words.append("ordinary")
    return " ".join(words)
