"""The order against what defines it: permutations per epoch, exact shares per block, and no memory."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.errors import DataError
from vlm.data.order import BLOCK, OPEN_SHARDS, Order, permutation, shares

seeds = st.integers(0, 2**63)


@given(st.integers(1, 60), seeds, st.integers(0, 3), st.sampled_from(["full", "none"]))
def test_every_epoch_of_one_source_is_a_permutation(size: int, seed: int, epoch: int, shuffle):
    order = Order([size], [2.5], seed, shuffle)
    places = [order.at(epoch * size + n) for n in range(size)]
    assert sorted(place.number for place in places) == list(range(size))
    assert {(place.source, place.epoch) for place in places} == {(0, epoch)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 10)), min_size=2, max_size=4), seeds, st.integers(0, 3))
def test_each_source_has_its_share_of_each_block_and_goes_through_its_epochs(sources, seed: int, block: int):
    sizes, weights = zip(*sources, strict=True)
    order = Order(sizes, weights, seed)
    counts = shares(weights, BLOCK)
    assert sum(counts) == BLOCK
    for source, (share, weight) in enumerate(zip(counts, weights, strict=True)):
        assert abs(share - BLOCK * weight / sum(weights)) < 1
        own = [place for n in range(BLOCK) if (place := order.at(block * BLOCK + n)).source == source]
        assert len(own) == share
        turns = [divmod(block * share + n, sizes[source])[0] for n in range(share)]
        assert [place.epoch for place in own] == turns


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_a_source_of_a_mixture_is_seen_whole_in_each_epoch(seed: int, first: int, second: int):
    order = Order([first, second], [1, 1], seed)
    places = [order.at(n) for n in range(BLOCK)]
    for source, size in enumerate((first, second)):
        own = [place for place in places if place.source == source]
        for epoch in range(own[-1].epoch):
            assert sorted(p.number for p in own if p.epoch == epoch) == list(range(size))


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_asking_in_any_order_gives_the_same(seed: int):
    positions = list(range(0, 4 * BLOCK, 37))
    forward = {n: Order([50, 7], [3, 1], seed).at(n) for n in positions[:5]}
    order = Order([50, 7], [3, 1], seed)
    shuffled = random.Random(seed).sample(positions, len(positions))
    asked = {n: order.at(n) for n in shuffled}
    assert all(asked[n] == place for n, place in forward.items())
    assert [order.at(n) for n in positions] == [asked[n] for n in positions]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), seeds)
def test_shuffling_by_shards_keeps_few_shards_open(counts: list[int], seed: int):
    size = sum(counts)
    order = Order([size], [1], seed, "shards", [counts])
    numbers = [order.at(n).number for n in range(size)]
    assert sorted(numbers) == list(range(size))
    shard_of = np.repeat(np.arange(len(counts)), counts)[numbers]
    opened = list(dict.fromkeys(shard_of.tolist()))
    last_use = {shard: max(np.flatnonzero(shard_of == shard)) for shard in opened}
    first_use = {shard: min(np.flatnonzero(shard_of == shard)) for shard in opened}
    for n in range(size):
        assert sum(first_use[shard] <= n <= last_use[shard] for shard in opened) <= OPEN_SHARDS


def test_epochs_seeds_and_sources_differ():
    def first(order: Order, start: int) -> list[int]:
        return [order.at(start + n).number for n in range(100)]

    one, two = Order([100], [1], 1), Order([100], [1], 2)
    assert first(one, 0) != first(one, 100) and first(one, 0) != first(two, 0)
    assert not np.array_equal(permutation(100, 1, 0, 0), permutation(100, 1, 1, 0))


def test_permutations_are_uniform():
    """Chi-square over all orders of 4 things: 23 degrees of freedom, so 60 has p < 1e-4."""
    counts = np.unique([permutation(4, seed) for seed in range(4800)], axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 200) ** 2 / 200).sum() < 60


def test_the_order_never_changes():
    """Frozen on purpose: another order would break every run that is resumed after an upgrade."""
    assert permutation(10, 1, 2).tolist() == [1, 3, 7, 9, 2, 8, 6, 4, 5, 0]
    order = Order([5, 7], [1, 3], 0)
    assert [tuple(order.at(n)) for n in range(4)] == [(1, 6, 0), (1, 5, 0), (1, 1, 0), (0, 2, 0)]


def test_shares_by_largest_remainder():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.7, 0.3], 1024) == [717, 307]
    assert shares([1, 0], 8) == [8, 0]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], [], "expected one for each of 0 sources"),
        ([3], [1, 2], "expected one for each of 1 sources, found 2"),
        ([3], [0], "not all 0"),
        ([3], [-1], "numbers of at least 0"),
        ([3], [float("nan")], "numbers of at least 0"),
        ([3, 0], [1, 1], "source 1: expected samples, found none"),
        ([3, 3], [1, 1e-6], "source 1: expected a weight of 0 or .*, found 1e-06"),
    ],
)
def test_bad_mixtures_are_refused(sizes: list[int], weights: list[float], message: str):
    with pytest.raises(DataError, match=message):
        Order(sizes, weights, 0)


def test_a_source_of_weight_nought_is_never_seen():
    order = Order([4, 0], [1, 0], 0)
    assert {order.at(n).source for n in range(2 * BLOCK)} == {0}
