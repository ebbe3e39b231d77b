"""Selectors that look at features: the numbers of the published codes, and loops over Python lists."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.models.program.diverse import (
    determinant_order,
    important_and_different,
    max_min_order,
    unlike_pivots,
    walk,
    without_twins,
)
from vlm.models.program.scores import key_strength, relevance_kernel, text_relevance
from vlm.models.program.segments import cosine, marks
from vlm.models.program.select import top


def everything(n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.bool)


def marked(chosen: Tensor) -> list[int]:
    return chosen[0].nonzero().flatten().tolist()


def case(seed: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, 4, generator=g), torch.rand(1, n, generator=g)


def test_the_hash_is_the_one_of_the_numbers(signed):
    expected = torch.tensor([[-0.8332, 0.3890, -0.7628], [-0.5229, 0.4116, -0.4382]])
    torch.testing.assert_close(signed(2, 2, 3), expected, rtol=0, atol=5e-5)


def test_max_min_order_gives_the_picks_of_divprune(signed, golden):
    order = max_min_order(signed(31, 12, 6)[None], everything(12), 5)
    assert order.tolist() == [golden["divprune_12_5"]]


def test_max_min_order_is_not_changed_by_padding_or_scale(signed, golden):
    x = torch.cat([torch.randn(3, 6), 7 * signed(31, 12, 6), torch.randn(2, 6)])[None]
    valid = torch.zeros(1, 17, dtype=torch.bool)
    valid[0, 3:15] = True
    assert (max_min_order(x, valid, 5) - 3).tolist() == [golden["divprune_12_5"]]


def test_max_min_ties_go_to_the_earlier_token():
    x = torch.eye(4)[[0, 0, 1, 2, 2, 3]][None]  # twins are at distance 0, all others at 1
    assert max_min_order(x, everything(6), 4).tolist() == [[2, 0, 3, 5]]


def test_determinant_order_gives_the_choice_of_cdpruner(signed, golden):
    relevance = text_relevance(signed(52, 1, 32, 8), signed(53, 1, 8)[:, None], everything(32), everything(1))
    order = determinant_order(relevance_kernel(signed(51, 1, 32, 24), relevance), everything(32), 8)
    assert sorted(order[0].tolist()) == golden["cdpruner_32_8"]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 7), st.integers(1, 4))
def test_determinant_order_takes_what_adds_most_to_the_determinant(seed, n, width):
    x, score = case(seed, n)
    x, score = x[..., :width].double(), score.double() + 0.1
    kernel = relevance_kernel(x, score)
    order = determinant_order(kernel, everything(n), n)[0].tolist()
    assert sorted(order) == list(range(n))
    rank = min(n, width)
    for picks in range(rank):
        chosen = order[:picks]

        def volume(t: int, chosen: list[int] = chosen) -> float:
            subset = torch.tensor([*chosen, t])
            return float(torch.linalg.det(kernel[0][subset][:, subset]))

        left = [t for t in range(n) if t not in chosen]
        assert volume(order[picks]) == pytest.approx(max(map(volume, left)), rel=1e-6)
    assert all(score[0, a] >= score[0, b] for a, b in pairwise(order[rank:]))  # rank used up: by relevance


def test_vispruner_gives_the_choice_of_the_official_code(signed, positive, golden):
    x, score = signed(41, 1, 64, 16), positive(42, 1, 4, 64).mean(1)
    kept = important_and_different(x, score, everything(64), torch.tensor([16]))
    assert marked(kept) == golden["vispruner"]["16_0.5"]


def twins_by_hand(similarity: Tensor, tokens: list[int], count: int, at_once: int) -> list[int]:
    while len(tokens) > count:
        first, second = tokens[0::2], tokens[1::2]
        alike = {a: max([float(similarity[a, b]) for b in second], default=-9.0) for a in first}
        first.sort(key=lambda a: -alike[a])
        tokens = first[min(at_once, len(tokens) - count, len(first)) :] + second
    return sorted(tokens)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 9), st.data())
def test_without_twins_by_hand(seed, n, at_once, data):
    (x, score), count = case(seed, n), data.draw(st.integers(0, n))
    order = sorted(range(n), key=lambda t: -float(score[0, t]))
    kept = without_twins(x, score, everything(n), torch.tensor([count]), at_once)
    assert marked(kept) == twins_by_hand(cosine(x, x)[0], order, count, at_once)


def walk_by_hand(distance: Tensor, order: list[int], count: int, slope: float, largest: float, step: str) -> list[int]:
    alive, picked = list(order), []
    while alive and len(picked) < count:
        token = alive.pop(0)
        picked.append(token)
        i = order.index(token) + 1 if step == "rank" else len(picked)
        alive = [t for t in alive if float(distance[token, t]) >= min(largest, i * slope)]
    picked += [t for t in order if t not in picked][: count - len(picked)]
    return sorted(picked)


@pytest.mark.parametrize("step", ["rank", "picked"])
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 16), st.floats(0, 0.5), st.data())
def test_walk_by_hand(step, seed, n, slope, data):
    (x, score), count = case(seed, n), data.draw(st.integers(0, n))
    order = sorted(range(n), key=lambda t: -float(score[0, t]))
    kept = walk(x, score, everything(n), torch.tensor([count]), torch.tensor([slope]), 0.9, step)
    assert marked(kept) == walk_by_hand(1 - cosine(x, x)[0], order, count, slope, 0.9, step)


def test_a_flat_walk_is_attention_and_a_steep_one_is_spread():
    x, score = case(0, 12)
    assert marked(walk(x, score, everything(12), torch.tensor([4]), torch.zeros(1))) == marked(
        top(score, everything(12), torch.tensor([4]))
    )
    twins = torch.cat([x, x], 1)  # each direction twice: a small radius strikes the second of each
    again = torch.cat([score + 1, score + 1], 1)
    kept = walk(twins, again, everything(24), torch.tensor([12]), torch.tensor([1e-5]))
    assert marked(kept) == list(range(12))


def test_dart_gives_the_choice_of_the_port(signed, golden):
    hidden, strength = signed(91, 1, 80, 16), key_strength(signed(92, 1, 4, 80, 8))
    own = top(strength[:, 10:58], everything(48), torch.tensor([4]))
    text = top(strength[:, 58:], everything(22), torch.tensor([4]))
    pivots = hidden[:, 58:][text][None]
    mine = [10 + t for t in marked(own)] + [58 + t for t in marked(text)]
    # the port takes its pivots in the order in which CPython holds this set of integers
    turns = [mine.index(t) for t in (59, 76, 79, 50, 22, 27, 62, 31)]
    kept = unlike_pivots(
        hidden[:, 10:58], everything(48), own, pivots, everything(4), torch.tensor([28]), torch.tensor([turns])
    )
    assert [10 + t for t in marked(kept)] == golden["dart"]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 14), st.integers(0, 3), st.data())
def test_unlike_pivots_by_hand(seed, n, texts, data):
    (x, score), count = case(seed, n), data.draw(st.integers(1, n))
    others = torch.randn(1, texts, 4, generator=torch.Generator().manual_seed(seed + 1))
    own = top(score, everything(n), torch.tensor([2]))
    kept = marked(own)[:count]
    pivots = [x[0, t] for t in kept] + list(others[0])
    share, extra = divmod(count - len(kept), len(pivots))
    for number, pivot in enumerate(pivots):
        likeness = cosine(pivot[None, None], x)[0, 0]
        left = sorted((t for t in range(n) if t not in kept), key=lambda t: (float(likeness[t]), t))
        kept += left[: share + (number < extra)]
    got = unlike_pivots(x, everything(n), own, others, torch.ones(1, texts, dtype=torch.bool), torch.tensor([count]))
    assert marked(got) == sorted(kept)
    assert len(kept) == count


SELECTORS = {
    "determinant": lambda x, score, valid, count: marks(
        determinant_order(relevance_kernel(x, score), valid, int(count.max())), valid, count
    ),
    "walk": lambda x, score, valid, count: walk(x, score, valid, count, torch.full((len(x),), 0.1)),
    "twins": lambda x, score, valid, count: without_twins(x, score, valid, count, 2),
    "important": lambda x, score, valid, count: important_and_different(x, score, valid, count, 0.5, 2),
    "pivots": lambda x, score, valid, count: unlike_pivots(
        x,
        valid,
        top(score, valid, torch.full_like(count, 2)),
        x.new_ones(len(x), 1, 4),
        x.new_ones(len(x), 1).bool(),
        count,
    ),
}


@pytest.mark.parametrize("name", SELECTORS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), share=st.floats(0.1, 1))
def test_the_budget_is_exact_and_segments_do_not_see_each_other(padded_case, name, seed, lengths, share):
    x, score, valid = padded_case(seed, lengths)
    count = torch.tensor([max(1, int(n * share)) for n in lengths])
    kept = SELECTORS[name](x, score, valid, count)
    assert kept.sum(1).tolist() == count.tolist()
    assert not (kept & ~valid).any()
    for s, n in enumerate(lengths):
        own = x[s : s + 1, valid[s]], score[s : s + 1, valid[s]]
        alone = SELECTORS[name](*own, torch.ones(1, n, dtype=torch.bool), count[s : s + 1])
        assert torch.equal(kept[s, valid[s]], alone[0])


@pytest.mark.parametrize("name", SELECTORS)
def test_a_budget_of_everything_keeps_everything(padded_case, name):
    x, score, valid = padded_case(1, [5, 2])
    assert torch.equal(SELECTORS[name](x, score, valid, torch.tensor([5, 2])), valid)
