"""Cache entries of layers and heads: published lists, and exact totals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.models.program.budget import Budget
from vlm.models.program.kv_budget import (
    Window,
    attention_density,
    gain_order,
    head_counts,
    preferred,
    pyramid,
    query_similarity,
    shares_by_density,
    whole_heads,
    window_in,
    window_statistics,
)


def test_pyramid_falls_as_in_the_paper():
    entries = pyramid(2048, 32, 10_000, 32)
    assert [entries[layer] - 32 for layer in (0, 1, 15, 31)] == [3932, 3809, 2087, 119]
    assert sum(entries) / 32 == pytest.approx(2048, abs=16)  # whole steps
    assert pyramid(2048, 32, 1500, 32) == [1500] * 32
    assert pyramid(2048, 32, 3000, 32) == [2048] * 32
    # a first layer that the prompt cannot fill: 107 before the window instead of 110, and the last layer gets more
    assert pyramid(64, 8, 115, 4) == [107 + 8, 73 + 8, 39 + 8, 5 + 8]


def test_density_and_shares_of_vl_cache():
    attention = torch.tensor([[[[1.0, 0.5, 0.001, 0.0], [0.2, 0.2, 0.2, 0.001]]]])
    visible = torch.tensor([[[True, True, True, False], [True, True, True, True]]])
    assert attention_density(attention, visible).item() == pytest.approx(5 / 7)
    assert shares_by_density([1, 3], 0.2) == pytest.approx([0.1, 0.3])
    assert shares_by_density([1, 3], 0.2, scale=0.9) == pytest.approx([0.09, 0.27])
    assert shares_by_density([0, 1], 0.6) == [0.01, 1.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 12), st.integers(0, 9), st.floats(0, 1), st.booleans())
def test_heads_share_exactly(seed, heads, n, base, floor, normalise):
    score = torch.rand(1, heads, n + 2, generator=torch.Generator().manual_seed(seed)).pow(4)
    valid = torch.ones(1, n + 2, dtype=torch.bool)
    valid[0, :2] = False
    count = head_counts(score, valid, base, floor, normalise)
    assert count.sum() == min(heads * base, heads * n)
    assert count.max() <= n
    assert count.min() >= min(int(floor * base), n)
    twice = head_counts(torch.cat([score, score]), torch.cat([valid, valid]), torch.tensor([base, 1]), floor, normalise)
    assert torch.equal(twice[:1], count)
    assert torch.equal(twice[1:], head_counts(score, valid, 1, floor, normalise))
    own = head_counts(score[..., 2:], valid[:, 2:], base, floor, normalise)
    assert torch.equal(count, own)


def test_a_head_with_much_mass_gets_more():
    score = torch.tensor([[[9.0, 8, 7, 6], [1, 1, 1, 1]]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    assert head_counts(score, valid, 2, floor=0, normalise=False).tolist() == [[4, 0]]
    assert head_counts(score, valid, 2, floor=0.5, normalise=False).tolist() == [[3, 1]]
    # its best entry holds a third of the second head's mass, but three quarters of the first's
    spread = torch.tensor([[[3.0, 1, 0, 0], [4.0, 4, 4, 0]]])
    assert head_counts(spread, valid, 1, floor=0, normalise=True).tolist() == [[1, 1]]
    assert head_counts(spread, valid, 1, floor=0, normalise=False).tolist() == [[0, 2]]


def test_query_similarity_of_tappa(signed, golden):
    found = query_similarity(signed(111, 2, 6, 8)[None])
    assert found.item() == pytest.approx(golden["tappa_qsim"], abs=1e-6)
    assert query_similarity(torch.ones(1, 2, 6, 8)).item() == pytest.approx(1)
    query = torch.randn(3, 2, 6, 8)
    real = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    own = [query_similarity(q[None, :, :n]).item() for q, n in zip(query, (6, 4), strict=False)]
    assert query_similarity(query, real).tolist() == pytest.approx([*own, 0])


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.integers(0, 200), st.integers(1, 64))
def test_preferred_entries_add_up_within_the_limit(preference, total, length):
    entries = preferred(preference, total, length)
    assert sum(entries) == min(total, length * len(preference))
    assert max(entries) <= length


def test_preferred_divides_what_is_clipped_evenly():
    assert preferred([1, 6, 2, 3], 192, 64) == [16 + 11, 64, 32 + 11, 48 + 10]
    assert preferred([1, 1, 2], 8, 9) == [2, 2, 4]
    assert preferred([1, 1, 2], 8, [9, 9, 2]) == [3, 3, 2]


def test_window_statistics_by_definition():
    attention = torch.rand(2, 3, 8, 5)
    attention[1, :, 5:] = 0  # the second sample has a window of five rows
    rows = torch.tensor([8, 5])
    expected = torch.stack([x[:, :n].mean(1) + 200 * x[:, :n].var(1) for x, n in zip(attention, (8, 5), strict=True)])
    got = window_statistics(attention.sum(2), attention.square().sum(2), rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    constant = torch.full((1, 1, 2), 0.25)
    assert window_statistics(4 * constant, 4 * constant**2, torch.tensor([4])).tolist() == [[[0.25, 0.25]]]
    assert window_statistics(constant, constant**2, torch.tensor([1])).tolist() == [[[0.25, 0.25]]]


def test_whole_heads_fall_over_the_layers():
    assert [whole_heads(layer, 32, 32) for layer in (0, 31)] == [8, 4]
    assert [whole_heads(layer, 32, 32, 0.3, 1) for layer in (0, 31)] == [9, 1]
    assert [whole_heads(layer, 32, 2, 0.5, 4) for layer in (0, 31)] == [1, 1]


def test_a_window_takes_at_most_half_the_budget():
    assert window_in(torch.tensor([1, 2, 3, 9, 63, 64, 500]), 32).tolist() == [1, 1, 1, 4, 31, 32, 32]
    assert window_in(torch.tensor([1, 9]), 0).tolist() == [0, 0]
    assert Window(32, Budget.parse("25%")).of(torch.tensor([20, 400])).tolist() == [2, 32]
    assert Window(8, Budget.parse(10)).of(torch.tensor([4, 400])).tolist() == [2, 5]


def test_layers_that_do_little_go_first():
    assert gain_order([0.5, 0.1, 0.9], [0.2, 0.2, 0.2]) == [1, 0, 2]
    assert gain_order([0.5, 0.5, 0.5], [0.1, 0.9, 0.5]) == [1, 2, 0]
