"""Intervals and tests against values known from elsewhere and against enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.benchmarks._shared.statistics import (
    bootstrap_ratio,
    mcnemar_exact,
    paired_bootstrap,
    rate,
    rate_change,
    sum_of_means,
    wilson,
)
from vlm.data.errors import DataError


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    # published example values of the score interval (Newcombe 1998, table I, method 3)
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_matches_newcombe(successes, n, expected):
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(pair):
    successes, n = pair
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_without_observations_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def enumerated_mcnemar(first, second) -> float:
    """Flip every disagreement both ways: the share of sign patterns at least as lopsided as the one seen."""
    signs = [a - b for a, b in zip(first, second, strict=True) if a != b]
    seen = abs(sum(signs))
    patterns = list(itertools.product((-1, 1), repeat=len(signs)))
    return sum(abs(sum(pattern)) >= seen for pattern in patterns) / len(patterns)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_mcnemar_equals_enumeration(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    assert mcnemar_exact(first, second) == pytest.approx(enumerated_mcnemar(first, second))


def test_mcnemar_survives_thousands_of_disagreements():
    assert mcnemar_exact([True] * 5000, [False] * 5000) < 1e-300
    assert mcnemar_exact([True, False] * 2500, [False, True] * 2500) == 1.0


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_ratio(values, np.ones(400), seed=1, draws=8000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_ratio(values, np.ones(400), seed=1, draws=8000) == (low, high)
    assert bootstrap_ratio(values, np.ones(400), seed=2, draws=8000) != (low, high)


def test_bootstrap_of_a_constant_ratio_is_that_ratio():
    assert bootstrap_ratio([1, 2, 3], [2, 4, 6]) == pytest.approx((0.5, 0.5))
    assert bootstrap_ratio([0, 0], [0, 0]) == (0.0, 0.0)
    assert bootstrap_ratio([], []) == (0.0, 0.0)


def test_pairing_sees_a_difference_that_separate_intervals_hide():
    rng = np.random.default_rng(3)
    first = rng.normal(0, 10, 200)
    second = first + rng.normal(0.5, 0.2, 200)
    ones = np.ones(200)
    change = paired_bootstrap((first, ones), (second, ones))
    assert change.difference == pytest.approx(np.mean(second - first))
    assert change.ci[0] > 0.4
    assert change.p < 0.01
    assert bootstrap_ratio(first, ones)[1] > bootstrap_ratio(second, ones)[0]


def test_no_difference_is_sure_of_nothing():
    same = ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    change = paired_bootstrap(same, same)
    assert (change.difference, change.ci, change.p) == (0.0, (0.0, 0.0), 1.0)


def test_unequal_lengths_are_refused():
    with pytest.raises(DataError, match="McNemar"):
        mcnemar_exact([True], [])
    with pytest.raises(DataError, match="paired"):
        paired_bootstrap(([1.0], [1.0]), ([1.0, 2.0], [1.0, 1.0]))
    with pytest.raises(DataError, match="bootstrap"):
        bootstrap_ratio([1.0], [])


def test_drawing_alike_items_together_is_the_same_bootstrap():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    rng = np.random.default_rng(5)
    means = values[rng.integers(10, size=(40_000, 10))].mean(axis=1)  # item by item
    low, high = bootstrap_ratio(values, np.ones(10), draws=40_000)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.05)
    # twenty thousand answers of two kinds take no more room than two
    many = bootstrap_ratio(np.tile(values, 2000), np.ones(20_000))
    assert many == pytest.approx((0.7 - 0.0064, 0.7 + 0.0064), abs=1e-3)


def test_a_sum_of_means_adds_means_and_variances():
    rng = np.random.default_rng(6)
    strata = [rng.normal(1, 2, 300), rng.normal(2, 1, 100)]
    total = sum_of_means(strata, draws=8000)
    assert total.difference == pytest.approx(strata[0].mean() + strata[1].mean())
    half = 1.96 * np.sqrt(strata[0].var() / 300 + strata[1].var() / 100)
    assert total.ci == pytest.approx((total.difference - half, total.difference + half), abs=0.02)
    assert total.p < 0.01
    assert sum_of_means([[0.0, 0.0]]).to_dict() == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0}
    with pytest.raises(DataError, match="expected items in every stratum"):
        sum_of_means([[1.0], []])


def test_rates_and_their_changes():
    assert rate([True, True, False, True]) == {"accuracy": 0.75, "n": 4, "ci": list(wilson(3, 4))}
    assert rate([]) == {"accuracy": 0.0, "n": 0, "ci": [0.0, 1.0]}
    change = rate_change([False, False, True, False], [True, True, True, False])
    assert (change["difference"], change["p"]) == (0.5, 0.5)
    with pytest.raises(DataError, match="paired"):
        rate_change([True], [])
