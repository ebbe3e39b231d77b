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


def _resampled(n: int, seed: int, draws: int) -> np.ndarray:
    """How often each of n items is drawn, [draws, n]."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


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
    ratios = _ratios(_resampled(len(top), seed, draws), np.asarray(top, float), np.asarray(bottom, float))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


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
    counts = _resampled(len(columns[0]), seed, draws)
    deltas = _ratios(counts, columns[2], columns[3]) - _ratios(counts, columns[0], columns[1])
    once = np.ones((1, len(columns[0])))
    observed = _ratios(once, columns[2], columns[3]) - _ratios(once, columns[0], columns[1])
    tail = min(float(np.mean(deltas <= 0)), float(np.mean(deltas >= 0)))
    low, high = np.quantile(deltas, (0.025, 0.975))
    return Difference(float(observed[0]), (float(low), float(high)), min(1.0, 2 * tail))


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
