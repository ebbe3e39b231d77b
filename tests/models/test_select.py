"""The catalogue of selectors, by definition and by the official numbers."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.models.program.program import Tokens
from vlm.models.program.select import even_stride, max_min_diversity, max_min_order, top, uniform_random

SELECTORS = {"random": uniform_random(3), "stride": even_stride(), "max-min": max_min_diversity()}


def hash_features(seed: int, *shape: int) -> torch.Tensor:
    """Inputs of the official numbers: an integer hash, uniform in [-1, 1)."""
    h = (2654435761 * numpy.arange(numpy.prod(shape), dtype=numpy.uint64) + 1013904223 * seed) % 2**32
    for multiplier, shift in ((1, 16), (2246822519, 13), (3266489917, 16)):
        h = h * numpy.uint64(multiplier) % 2**32
        h ^= h >> numpy.uint64(shift)
    return torch.from_numpy(2 * (h / 2**32).astype(numpy.float32) - 1).reshape(shape)


def test_the_hash_is_the_one_of_the_numbers():
    expected = torch.tensor([[-0.8332, 0.3890, -0.7628], [-0.5229, 0.4116, -0.4382]])
    torch.testing.assert_close(hash_features(2, 2, 3), expected, rtol=0, atol=5e-5)


def test_max_min_order_gives_the_picks_of_the_official_code():
    # DivPrune's published code on CPU: features S(31, 12, 6), keep 5
    x = hash_features(31, 12, 6)
    assert max_min_order(x[None], torch.ones(1, 12, dtype=torch.bool), 5).tolist() == [[11, 5, 1, 6, 3]]


def test_max_min_order_is_not_changed_by_padding_or_scale():
    x = torch.cat([torch.randn(3, 6), 7 * hash_features(31, 12, 6), torch.randn(2, 6)])[None]
    valid = torch.zeros(1, 17, dtype=torch.bool)
    valid[0, 3:15] = True
    assert (max_min_order(x, valid, 5) - 3).tolist() == [[11, 5, 1, 6, 3]]


def test_max_min_ties_go_to_the_earlier_token():
    x = torch.eye(4)[[0, 0, 1, 2, 2, 3]][None]  # twins are at distance 0, all others at 1
    assert max_min_order(x, torch.ones(1, 6, dtype=torch.bool), 4).tolist() == [[2, 0, 3, 5]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_top_is_a_stable_sort(scores, data):
    valid = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    count = data.draw(st.integers(0, sum(valid)))
    candidates = [t for t in range(len(scores)) if valid[t]]
    expected = sorted(sorted(candidates, key=lambda t: (-scores[t], t))[:count])
    marked = top(torch.tensor([scores]).float(), torch.tensor([valid]), torch.tensor([count]))
    assert marked[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    ("n", "count", "kept"), [(8, 2, [2, 6]), (9, 3, [1, 4, 7]), (5, 4, [0, 1, 3, 4]), (3, 3, [0, 1, 2])]
)
def test_stride_by_definition(n, count, kept):
    tokens = Tokens(torch.zeros(1, n, 1), torch.ones(1, n, dtype=torch.bool), torch.zeros(1, dtype=torch.long), _none)
    marked = even_stride().choose(tokens, torch.tensor([count]))
    assert marked[0].nonzero().flatten().tolist() == kept == [int((i + 0.5) * n / count) for i in range(count)]


def test_random_is_uniform_over_tokens_and_follows_the_seed():
    hits = torch.zeros(6)
    for pixels in range(600):
        tokens = Tokens(torch.zeros(1, 6, 1), torch.ones(1, 6, dtype=torch.bool), torch.tensor([pixels]), _none)
        marked = uniform_random(0).choose(tokens, torch.tensor([2]))
        assert torch.equal(marked, uniform_random(0).choose(tokens, torch.tensor([2])))
        hits += marked[0]
    assert (hits - 200).abs().max() < 60  # five standard deviations: sqrt(600 * 1/3 * 2/3) = 11.5
    tokens = Tokens(torch.zeros(1, 99, 1), torch.ones(1, 99, dtype=torch.bool), torch.tensor([5]), _none)
    draws = [uniform_random(seed).choose(tokens, torch.tensor([40])) for seed in (0, 1)]
    assert not torch.equal(*draws)


def _none(signal: object) -> torch.Tensor:
    raise AssertionError(f"no selector here asks for {signal}")


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("counts", [[5, 7], [7, 5], [8, 4], [1, 8]])
def test_segments_may_keep_different_numbers(name, counts):
    tokens = Tokens(torch.randn(2, 8, 4), torch.ones(2, 8, dtype=torch.bool), torch.tensor([3, 4]), _none)
    assert SELECTORS[name].choose(tokens, torch.tensor(counts)).sum(1).tolist() == counts


@pytest.mark.parametrize("name", SELECTORS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_segments_of_any_length_do_not_see_each_other(name, data):
    width = data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=1, max_size=4).filter(any))
    counts = [data.draw(st.integers(min(n, 1), n)) for n in lengths]
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, seed = torch.randn(len(lengths), width, 4, generator=g), torch.randint(0, 9**9, (len(lengths),), generator=g)
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    for s, n in enumerate(lengths):
        valid[s, torch.randperm(width, generator=g)[:n]] = True
    marked = SELECTORS[name].choose(Tokens(x, valid, seed, _none), torch.tensor(counts))
    assert marked.sum(1).tolist() == counts
    assert not (marked & ~valid).any()
    for s, n in enumerate(lengths):
        if n:
            own = Tokens(x[s : s + 1, valid[s]], torch.ones(1, n, dtype=torch.bool), seed[s : s + 1], _none)
            single = SELECTORS[name].choose(own, torch.tensor(counts[s : s + 1]))
            assert torch.equal(marked[s, valid[s]], single[0])
