"""Reducers and clusters: the numbers of the published codes, and loops over tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.models.program.clusters import density_peaks
from vlm.models.program.reduce import (
    Reduced,
    add_clusters,
    add_contextual,
    add_weighted_neighbours,
    average_into_nearest,
    drop,
)
from vlm.models.program.scores import shares
from vlm.models.program.segments import cosine
from vlm.models.program.select import outliers, top


def everything(n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.bool)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def nearest(x: Tensor, token: int, targets: list[int]) -> int:
    likeness = cosine(x[token][None, None], x[targets][None])[0, 0]
    return targets[int(likeness.argmax())]


def test_contextual_tokens_are_those_of_visionzip(signed, positive, golden):
    hidden, attention, key = signed(71, 1, 25, 6), positive(72, 1, 2, 25, 25), signed(73, 1, 25, 8)
    kept = top(attention[:, :, 0, 1:].sum(1), everything(24), torch.tensor([5]))
    found = add_contextual(hidden[:, 1:], key[:, 1:], everything(24), kept, torch.tensor([3]))
    expected = torch.tensor(golden["visionzip_24"])
    close(expected[0], hidden[0, 0])  # the class token, which VisionZip keeps as well
    is_kept = kept[0, found.place[0]]
    close(found.features[0, is_kept], expected[1:6])
    close(found.features[0, ~is_kept], expected[6:])


def test_neighbours_and_rest_are_those_of_prumerge(signed, golden):
    hidden, query, key = signed(81, 1, 577, 8), 6 * signed(82, 1, 577, 8), signed(83, 1, 577, 8)
    attention = (query[:, :1] @ key.transpose(1, 2) * 8**-0.5).softmax(-1)[:, 0, 1:]
    kept = outliers(attention, everything(576))
    assert int(kept.sum()) / 576 == golden["prumerge"]["ratio"]
    found = add_weighted_neighbours(hidden[:, 1:], key[:, 1:], attention, everything(576), kept)
    assert int(found.valid.sum()) == golden["prumerge"]["n"]
    close(found.features[0, found.place[0] == attention.argmax()][0], torch.tensor(golden["prumerge"]["first"]))
    rest = found.features[0, ~kept[0, found.place[0]]]
    torch.testing.assert_close(rest, torch.tensor([golden["prumerge"]["last"]]), rtol=1e-4, atol=1e-6)


def test_clusters_are_those_of_sparsevlm(signed, golden):
    x = signed(121, 1, 15, 6)
    centre, cluster = density_peaks(x, everything(15), torch.tensor([3]))
    sums = [float(x[0, cluster[0] == t].mean(0).sum()) for t in centre[0].nonzero().flatten()]
    assert sorted(sums) == pytest.approx(golden["sparsevlm_merge_sorted_rowsum"], abs=1e-5)


def peaks_by_hand(x: Tensor, clusters: int) -> tuple[list[int], list[int]]:
    n = len(x)
    distance = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    near = min(clusters, n)
    density = [-sum(sorted(d**2 for d in row)[:near]) / near for row in distance]
    apart = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart.append(min((distance[i][j] for j in denser), default=max(map(max, distance))))
    weight = [float(torch.tensor(density[i]).exp()) * apart[i] for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: -weight[i])[:clusters])
    return centres, [i if i in centres else min(centres, key=lambda c: distance[i][c]) for i in range(n)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 14), st.integers(1, 5))
def test_density_peaks_by_hand(seed, n, clusters):
    x = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed)).double()
    centre, cluster = density_peaks(x, everything(n), torch.tensor([clusters]))
    assert (centre[0].nonzero().flatten().tolist(), cluster[0].tolist()) == peaks_by_hand(x[0], clusters)


def test_equal_tokens_make_clusters_without_chance():
    centre, cluster = density_peaks(torch.ones(1, 4, 3), everything(4), torch.tensor([2]))
    assert centre.tolist() == [[True, True, False, False]]
    assert cluster.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("before", "kept", "after"),  # token counts of SparseVLM's lists for 192, 128 and 64 tokens
    [(576, 300, 309), (309, 200, 204), (204, 110, 113), (576, 303, 312), (576, 66, 82), (82, 30, 32), (32, 17, 18)],
)
def test_number_of_recycled_clusters(before, kept, after):
    x, score = torch.randn(1, before, 2), torch.rand(1, before)
    marks = top(score, everything(before), torch.tensor([kept]))
    assert int(add_clusters(x, score, everything(before), marks).valid.sum()) == after


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(2, 40), st.data())
def test_clusters_by_hand(seed, n, data):
    g = torch.Generator().manual_seed(seed)
    x, score = torch.randn(1, n, 3, generator=g).double(), torch.rand(1, n, generator=g)
    kept = top(score.flip(1), everything(n), torch.tensor([data.draw(st.integers(0, n - 1))]))
    dropped = [t for t in range(n) if not kept[0, t]]
    best = sorted(sorted(dropped, key=lambda t: -float(score[0, t]))[: int(0.3 * len(dropped)) + 1])
    centres, cluster = peaks_by_hand(x[0, best], len(best) // 10 + 1)
    rows = [(t, x[0, t]) for t in range(n) if kept[0, t]]
    for c in centres:
        rows.append((best[c], x[0, [best[i] for i in range(len(best)) if cluster[i] == c]].mean(0)))
    rows.sort(key=lambda row: row[0])
    found = add_clusters(x, score, everything(n), kept)
    assert found.place[0].tolist() == [place for place, _ in rows]
    close(found.features[0], torch.stack([feature for _, feature in rows]))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 12), st.data())
def test_average_into_nearest_by_hand(seed, n, data):
    x = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed))
    targets = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    kept = torch.zeros(1, n, dtype=torch.bool)
    kept[0, targets] = True
    groups = {t: [t] for t in targets}
    for t in set(range(n)) - set(targets):
        groups[nearest(x[0], t, targets)].append(t)
    found = average_into_nearest(x, everything(n), kept)
    assert found.place[0].tolist() == targets
    assert found.size is not None
    assert found.size[0].tolist() == [len(groups[t]) for t in targets]
    close(found.features[0], torch.stack([x[0, groups[t]].mean(0) for t in targets]))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(2, 12), st.integers(0, 4), st.data())
def test_contextual_by_hand(seed, n, count, data):
    g = torch.Generator().manual_seed(seed)
    x, key = torch.randn(1, n, 3, generator=g), torch.randn(1, n, 2, generator=g)
    others = sorted(data.draw(st.sets(st.integers(0, n - 1))))
    kept = everything(n)
    kept[0, others] = False
    targets = others[:: max(1, len(others) // max(count, 1))][:count]
    rows = {t: x[0, t] for t in range(n) if kept[0, t]}
    for target in targets:
        joined = [t for t in others if t not in targets and nearest(key[0], t, targets) == target]
        rows[target] = x[0, target] + (x[0, joined].mean(0) if joined else 0)
    found = add_contextual(x, key, everything(n), kept, torch.tensor([count]))
    assert found.place[0].tolist() == sorted(rows)
    close(found.features[0], torch.stack([rows[t] for t in sorted(rows)]) if rows else x[0, :0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(2, 12), st.integers(1, 4), st.data())
def test_weighted_neighbours_by_hand(seed, n, neighbours, data):
    g = torch.Generator().manual_seed(seed)
    x, key, weight = torch.randn(1, n, 3, generator=g), torch.randn(1, n, 2, generator=g), torch.rand(1, n, generator=g)
    dropped = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1)))
    kept = everything(n)
    kept[0, dropped] = False
    likeness = cosine(key, key)[0]
    rows = []
    for t in set(range(n)) - set(dropped):
        near = sorted((o for o in range(n) if o != t), key=lambda o: -float(likeness[t, o]))[:neighbours]
        rows.append((t, x[0, t] + sum(weight[0, o] * x[0, o] for o in near)))
    heaviest = max(dropped, key=lambda t: float(weight[0, t]))
    rows.append((heaviest, torch.stack([weight[0, t] * x[0, t] for t in dropped]).sum(0)))
    rows.sort(key=lambda row: row[0])
    found = add_weighted_neighbours(x, key, weight, everything(n), kept, neighbours)
    assert found.place[0].tolist() == [place for place, _ in rows]
    close(found.features[0], torch.stack([feature for _, feature in rows]))


def test_of_equal_neighbours_the_earlier_ones_are_added():
    x, key = torch.eye(5)[None], torch.tensor([[[1.0, 0], [0, 1], [0, 1], [1, 0], [0, 1]]])
    kept = torch.tensor([[False, True, False, False, False]])
    found = add_weighted_neighbours(x, key, torch.ones(1, 5), everything(5), kept, 1)
    assert found.features[0, found.place[0] == 1].tolist() == [[0, 1, 1, 0, 0]]  # number 2, not number 4


REDUCERS = {
    "drop": lambda x, score, valid, kept: drop(x, valid, kept),
    "average": lambda x, score, valid, kept: average_into_nearest(x, valid, kept),
    "contextual": lambda x, score, valid, kept: add_contextual(x, -x, valid, kept, torch.full((len(x),), 2)),
    "neighbours": lambda x, score, valid, kept: add_weighted_neighbours(x, -x, shares(score, valid), valid, kept, 3),
    "clusters": lambda x, score, valid, kept: add_clusters(x, score, valid, kept, 0.9, 2),
}


@pytest.mark.parametrize("name", REDUCERS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), share=st.floats(0.1, 1))
def test_segments_do_not_see_each_other(padded_case, name, seed, lengths, share):
    x, score, valid = padded_case(seed, lengths)
    kept = top(score, valid, torch.tensor([max(1, int(n * share)) for n in lengths]))
    x = torch.where(valid[..., None], x, torch.nan)  # not even through a product with zero
    found = REDUCERS[name](x, score, valid, kept)
    assert bool(found.valid.any(0).all())  # no column is padding alone
    for s, n in enumerate(lengths):
        own = valid[s]
        alone: Reduced = REDUCERS[name](x[s : s + 1, own], score[s : s + 1, own], everything(n), kept[s : s + 1, own])
        here = found.valid[s]
        assert bool(here[: int(here.sum())].all())  # padding comes last
        assert found.place[s, here].tolist() == own.nonzero().flatten()[alone.place[0]].tolist()
        close(found.features[s, here], alone.features[0])


@pytest.mark.parametrize("name", REDUCERS)
def test_to_keep_everything_changes_no_bit(padded_case, name):
    x, score, valid = padded_case(3, [6, 6])
    found = REDUCERS[name](x, score, valid, valid)
    assert found.valid.all()
    assert torch.equal(found.features, x[valid].unflatten(0, (2, 6)))


@pytest.mark.parametrize("name", REDUCERS)
def test_gradients_reach_the_features_that_are_used(padded_case, name):
    x, score, valid = padded_case(4, [7, 4])
    kept = top(score, valid, torch.tensor([2, 3]))
    x = x.requires_grad_()
    REDUCERS[name](x, score, valid, kept).features.square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad[kept] != 0).any(1).all())
    assert bool((x.grad[~valid] == 0).all())
    if name in ("average", "contextual", "neighbours"):
        assert bool((x.grad[valid] != 0).any(1).all())


@pytest.mark.parametrize("name", REDUCERS)
def test_half_precision_features_come_back_in_it(padded_case, name):
    x, score, valid = padded_case(5, [7, 4])
    kept = top(score, valid, torch.tensor([2, 3]))
    assert REDUCERS[name](x.bfloat16(), score, valid, kept).features.dtype == torch.bfloat16
