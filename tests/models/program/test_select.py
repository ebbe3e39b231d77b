"""Selectors that go by score, place and chance, against loops over Python lists."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.models.program.program import Tokens
from vlm.models.program.select import (
    even,
    even_stride,
    every_nth,
    max_min_diversity,
    outliers,
    random_scores,
    top,
    top_per_group,
    uniform_random,
    windows_and_rest,
    windows_of,
)

SELECTORS = {"random": uniform_random(3), "stride": even_stride(), "max-min": max_min_diversity()}


def marked(marks: Tensor) -> list[int]:
    return marks[0].nonzero().flatten().tolist()


def best(scores: list[float], among: list[int], count: int) -> list[int]:
    """The definition: sorted by falling score, then by place."""
    return sorted(sorted(among, key=lambda t: (-scores[t], t))[:count])


@given(st.lists(st.sampled_from([-torch.inf, 0.0, 1.0, 2.0]), min_size=1, max_size=9), st.data())
def test_top_is_a_stable_sort(scores, data):
    valid = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    count = data.draw(st.integers(0, sum(valid) + 2))
    expected = best(scores, [t for t in range(len(scores)) if valid[t]], count)
    assert marked(top(torch.tensor([scores]), torch.tensor([valid]), torch.tensor([count]))) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=12), st.data())
def test_top_per_group_sorts_each_group(rows, data):
    scores, groups, valid = ([row[i] for row in rows] for i in range(3))
    quota = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
    expected = []
    for g in range(3):
        expected += best(scores, [t for t in range(len(rows)) if valid[t] and groups[t] == g], quota[g])
    got = top_per_group(
        torch.tensor([scores]).float(), torch.tensor([valid]), torch.tensor([groups]), torch.tensor([quota])
    )
    assert marked(got) == sorted(expected)


def test_windows_give_the_choice_of_vscan(positive, golden):
    score, index = positive(61, 1, 576), torch.arange(576)[None]
    valid, window = torch.ones(1, 576, dtype=torch.bool), windows_of(index // 24, index % 24, 6)
    assert marked(top_per_group(score, valid, window, torch.full((1, 16), 3))) == golden["vscan_local_48"]
    both = windows_and_rest(score, score.flip(1), valid, window, torch.tensor([96]))
    rest = [t for t in range(576) if t not in golden["vscan_local_48"]]
    others = best(score.flip(1)[0].tolist(), rest, 48)
    assert marked(both) == sorted(golden["vscan_local_48"] + others)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1), st.data())
def test_windows_and_rest_keep_the_budget_on_any_grid(rows, columns, size, share, data):
    n = rows * columns
    count, index = data.draw(st.integers(0, n)), torch.arange(n)[None]
    window = windows_of(index // columns, index % columns, size)
    g = torch.Generator().manual_seed(n)
    local, overall = torch.rand(1, n, generator=g), torch.rand(1, n, generator=g)
    got = windows_and_rest(local, overall, torch.ones(1, n, dtype=torch.bool), window, torch.tensor([count]), share)
    each = int(count * share) // len(set(window[0].tolist()))
    chosen = set()
    for w in set(window[0].tolist()):
        chosen |= set(best(local[0].tolist(), [t for t in range(n) if window[0, t] == w], each))
    rest = best(overall[0].tolist(), [t for t in range(n) if t not in chosen], count - len(chosen))
    assert marked(got) == sorted(chosen | set(rest))
    assert got.sum() == count


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.sampled_from([0.5, 1.5]))
def test_outliers_by_quartiles(values, factor):
    low, high = numpy.percentile(values, [25, 75])
    far = [t for t, v in enumerate(values) if v > high + factor * (high - low)]
    got = outliers(torch.tensor([values]).float(), torch.ones(1, len(values), dtype=torch.bool), factor)
    assert marked(got) == (far or [values.index(max(values))])


def test_every_nth_as_prumerge_plus_counts():
    valid = torch.ones(1, 576, dtype=torch.bool)
    assert marked(every_nth(valid, torch.tensor([5]))) == list(range(0, 575, 5))
    assert marked(every_nth(valid, torch.tensor([1]))) == list(range(575))


@pytest.mark.parametrize(
    ("n", "count", "kept"), [(8, 2, [2, 6]), (9, 3, [1, 4, 7]), (5, 4, [0, 1, 3, 4]), (3, 3, [0, 1, 2])]
)
def test_stride_by_definition(n, count, kept):
    tokens = Tokens.of_images(
        torch.zeros(1, n, 1), torch.ones(1, n, dtype=torch.bool), torch.zeros(1, dtype=torch.long), _none
    )
    chosen = even_stride().choose(tokens, torch.tensor([count]))
    assert marked(chosen) == kept == [int((i + 0.5) * n / count) for i in range(count)]


def test_random_is_uniform_over_tokens_and_follows_the_seed():
    valid = torch.ones(1, 6, dtype=torch.bool)
    hits = torch.zeros(6)
    for pixels in range(600):
        chosen = top(random_scores(valid, torch.tensor([pixels]), 0), valid, torch.tensor([2]))
        assert torch.equal(chosen, top(random_scores(valid, torch.tensor([pixels]), 0), valid, torch.tensor([2])))
        hits += chosen[0]
    assert (hits - 200).abs().max() < 60  # five standard deviations: sqrt(600 * 1/3 * 2/3) = 11.5
    tokens = Tokens.of_images(torch.zeros(1, 99, 1), torch.ones(1, 99, dtype=torch.bool), torch.tensor([5]), _none)
    draws = [uniform_random(seed).choose(tokens, torch.tensor([40])) for seed in (0, 1)]
    assert not torch.equal(*draws)


def _none(signal: object) -> Tensor:
    raise AssertionError(f"no selector here asks for {signal}")


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("counts", [[5, 7], [7, 5], [8, 4], [1, 8], [9, 99]])
def test_segments_may_keep_different_numbers(name, counts):
    tokens = Tokens.of_images(torch.randn(2, 8, 4), torch.ones(2, 8, dtype=torch.bool), torch.tensor([3, 4]), _none)
    chosen = SELECTORS[name].choose(tokens, torch.tensor(counts))
    assert chosen.sum(1).tolist() == [min(count, 8) for count in counts]


@pytest.mark.parametrize("name", SELECTORS)
@settings(deadline=None, max_examples=40)
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
    chosen = SELECTORS[name].choose(Tokens.of_images(x, valid, seed, _none), torch.tensor(counts))
    assert chosen.sum(1).tolist() == counts
    assert not (chosen & ~valid).any()
    for s, n in enumerate(lengths):
        if n:
            own = Tokens.of_images(x[s : s + 1, valid[s]], torch.ones(1, n, dtype=torch.bool), seed[s : s + 1], _none)
            single = SELECTORS[name].choose(own, torch.tensor(counts[s : s + 1]))
            assert torch.equal(chosen[s, valid[s]], single[0])


def test_selectors_by_score_are_the_same_alone_and_padded(padded):
    lengths = [9, 1, 6]
    score, index = torch.rand(3, 9), torch.arange(9).expand(3, -1)
    (wide, row, column), valid = padded(0, lengths, score, index // 3, index % 3)
    window, count = windows_of(row, column, 2).masked_fill(~valid, 0), torch.tensor([5, 1, 4])
    chosen = {
        "windows": windows_and_rest(wide, 1 - wide, valid, window, count),
        "outliers": outliers(wide, valid, 0.1),
        "nth": every_nth(valid, torch.tensor([2, 1, 3])),
        "even": even(valid, count),
    }
    for s, n in enumerate(lengths):
        own, all_ = score[s : s + 1, :n], torch.ones(1, n, dtype=torch.bool)
        one = windows_of(index[:1, :n] // 3, index[:1, :n] % 3, 2)
        alone = {
            "windows": windows_and_rest(own, 1 - own, all_, one, count[s : s + 1]),
            "outliers": outliers(own, all_, 0.1),
            "nth": every_nth(all_, torch.tensor([[2, 1, 3][s]])),
            "even": even(all_, count[s : s + 1]),
        }
        assert {k: v[s, valid[s]].tolist() for k, v in chosen.items()} == {k: v[0].tolist() for k, v in alone.items()}
