"""How sure a number is: intervals and paired tests, seeded, with nothing but numpy.

Rates of one answer per item get Wilson's score interval (Wilson 1927); ratios of sums get a percentile
bootstrap over items (Efron 1979). Two methods answered the same items, so they are compared item by item:
McNemar's exact test for right or wrong, a paired bootstrap for the rest. Unpaired intervals of two methods
may overlap although one is surely better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.errors import DataError

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
DRAWS = 2000


@dataclass(frozen=True)
class Difference:
    """Second minus first, with its 95 % interval and the two-sided probability of it by chance."""

    difference: float
    ci: tuple[float, float]
    p: float

    def to_dict(self) -> dict[str, float | list[float]]:
        return {"difference": self.difference, "ci": list(self.ci), "p": self.p}


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a rate; (0, 1) without any observation."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    # at 0 and n the bound is exact; rounding must not push it past the rate itself
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def _resampled(columns: Sequence[np.ndarray], seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap samples of items with several numbers each: the kinds of items, [columns, kinds], and how often each
    kind is drawn, [draws, kinds].

    Items that are alike are drawn as one kind, which is the same distribution: 15 000 yes-no answers take no more
    room than their few kinds.
    """
    kinds, repeats = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
    n = len(columns[0])
    rng = np.random.Generator(np.random.PCG64(seed))
    return kinds.T, rng.multinomial(n, repeats / n, size=draws).astype(np.float64)


def _ratios(counts: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Ratio of sums in each draw; 0 where the lower sum is 0, as for the metric itself."""
    below = counts @ bottom
    return np.divide(counts @ top, below, out=np.zeros_like(below), where=below > 0)


def bootstrap_ratio(
    top: Sequence[float], bottom: Sequence[float], *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % interval of sum(top) / sum(bottom) over items; with bottom = 1 everywhere, of a mean.

    Raises:
        DataError: lengths differ.
    """
    if len(top) != len(bottom):
        raise DataError(f"bootstrap: {len(top)} numerators and {len(bottom)} denominators; expected as many")
    if not len(top):
        return 0.0, 0.0
    kinds, counts = _resampled([np.asarray(top, float), np.asarray(bottom, float)], seed, draws)
    return _middle(_ratios(counts, *kinds))


def paired_bootstrap(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Difference:
    """Difference of two ratios of sums over the same items, each given as (numerators, denominators).

    Raises:
        DataError: the four sequences differ in length, or are empty.
    """
    columns = [np.asarray(column, float) for column in (*first, *second)]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(f"paired bootstrap: expected the same items on both sides, found lengths {sorted(lengths)}")
    kinds, counts = _resampled(columns, seed, draws)
    deltas = _ratios(counts, kinds[2], kinds[3]) - _ratios(counts, kinds[0], kinds[1])
    once = np.ones((1, len(columns[0])))
    observed = _ratios(once, columns[2], columns[3]) - _ratios(once, columns[0], columns[1])
    return _difference(float(observed[0]), deltas)


def _middle(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _difference(observed: float, draws: np.ndarray) -> Difference:
    tail = min(float(np.mean(draws <= 0)), float(np.mean(draws >= 0)))
    return Difference(observed, _middle(draws), min(1.0, 2 * tail))


def sum_of_means(strata: Sequence[Sequence[float]], *, seed: int = 0, draws: int = DRAWS) -> Difference:
    """The sum of the means of several strata, with its bootstrap interval (items are drawn within each stratum) and
    the probability of it on either side of 0.

    For a score that adds up over tasks (MME): `.ci` of the items' values is its interval, and the whole of it, given
    the items' changes, compares two methods.

    Raises:
        DataError: no stratum, or an empty one.
    """
    if not strata or not all(len(values) for values in strata):
        raise DataError(f"bootstrap: expected items in every stratum, found {[len(values) for values in strata]}")
    total = np.zeros(draws)
    for number, values in enumerate(strata):
        (kinds,), counts = _resampled([np.asarray(values, float)], seed + number, draws)
        total += counts @ kinds / len(values)
    return _difference(sum(float(np.mean(values)) for values in strata), total)


def rate(right: Sequence[bool]) -> dict[str, Any]:
    """accuracy, n and ci of answers that are right or wrong; accuracy is 0 where there are none."""
    n = len(right)
    return {"accuracy": sum(right) / n if n else 0.0, "n": n, "ci": list(wilson(sum(right), n))}


def rate_change(before: Sequence[bool], after: Sequence[bool], *, seed: int = 0) -> dict[str, Any]:
    """Change of a rate over the same items: difference, ci (paired bootstrap) and p (McNemar, exact).

    Raises:
        DataError: lengths differ, or there are no items.
    """
    ones = [1.0] * len(before)
    change = paired_bootstrap((before, ones), (after, [1.0] * len(after)), seed=seed).to_dict()
    return {**change, "p": mcnemar_exact(before, after)}


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact probability that two answerers are equally often right, from the items they disagree
    on.

    Raises:
        DataError: lengths differ.
    """
    if len(first) != len(second):
        raise DataError(f"McNemar: {len(first)} and {len(second)} answers; expected the same items on both sides")
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)
