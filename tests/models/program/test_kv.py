"""Cache policies: the numbers of the published codes, and what each promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.models.program.kv import (
    first_and_recent,
    group_heads,
    hidden_strength,
    lightest,
    observed,
    outside_span,
    pooled,
    recent,
    semantic_distance,
    some_heads_whole,
    top_entries,
    with_recent_share,
    without_repeats,
)


def everything(n: int, batch: int = 1) -> Tensor:
    return torch.ones(batch, n, dtype=torch.bool)


def indices(marks: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in marks]


def sides(lengths: list[int], side: str) -> Tensor:
    place = torch.arange(max(lengths))
    longest, length = max(lengths), torch.tensor(lengths)[:, None]
    return place < length if side == "right" else place >= longest - length


def test_the_choice_of_snapkv(signed, golden):
    key, query = signed(101, 1, 2, 48, 8), 2 * signed(102, 1, 2, 48, 8)
    future = ~torch.ones(8, 48, dtype=torch.bool).tril(40)
    score = (query[:, :, -8:] @ key.transpose(2, 3) * 8**-0.5).masked_fill(future, -torch.inf).softmax(-1).sum(2)
    assert indices(observed(score, everything(48), 20, 8)[0]) == golden["snapkv_avg5"]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 14), st.integers(1, 12), st.sampled_from([1, 3, 5]), st.booleans())
def test_observed_by_hand(seed, n, capacity, kernel, mean):
    score = torch.rand(1, 2, n, generator=torch.Generator().manual_seed(seed))
    window = min(3, capacity)
    kept = indices(observed(score, everything(n), capacity, window, kernel, "mean" if mean else "max")[0])
    before = max(n - window, 0)
    for h in range(2):
        smooth = []
        for t in range(before):
            near = score[0, h, max(t - kernel // 2, 0) : min(t + kernel // 2 + 1, before)]
            smooth.append(float(near.sum() / kernel if mean else near.max()))
        best = sorted(range(before), key=lambda t, s=smooth: (-round(s[t], 6), t))[: max(capacity - window, 0)]
        assert kept[h] == sorted(best) + list(range(before, n))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mean", "max"])
def test_padding_and_other_rows_change_nothing(side, how):
    lengths, g = [9, 4, 12], torch.Generator().manual_seed(0)
    valid, score = sides(lengths, side), torch.rand(3, 2, 12, generator=g)
    capacity = torch.tensor([6, 5, 7])
    value = torch.randn(3, 2, 12, 4, generator=g)
    kept = {
        "observed": observed(score, valid, capacity, 2, 3, how),
        "windows": observed(score, valid, capacity, torch.tensor([1, 3, 2]), 3, how),
        "heads": observed(score, valid, torch.stack([capacity, capacity - 1], 1), torch.tensor([1, 3, 2]), 3, how),
        "share": with_recent_share(score, valid, capacity, 0.4),
        "stream": first_and_recent(valid, 1, 3)[:, None].expand(-1, 2, -1),
        "streams": first_and_recent(valid, capacity // 4, capacity // 2)[:, None].expand(-1, 2, -1),
        "whole": some_heads_whole(score, valid, semantic_distance(score, value, valid, 3), 1, 14, 1, 2),
    }
    for s, n in enumerate(lengths):
        own, all_, count = score[s : s + 1, :, valid[s]], everything(n), capacity[s : s + 1]
        distance = semantic_distance(own, value[s : s + 1, :, valid[s]], all_, 3)
        alone = {
            "observed": observed(own, all_, count, 2, 3, how),
            "windows": observed(own, all_, count, [1, 3, 2][s], 3, how),
            "heads": observed(own, all_, torch.stack([count, count - 1], 1), [1, 3, 2][s], 3, how),
            "share": with_recent_share(own, all_, count, 0.4),
            "stream": first_and_recent(all_, 1, 3)[:, None].expand(-1, 2, -1),
            "streams": first_and_recent(all_, int(count) // 4, int(count) // 2)[:, None].expand(-1, 2, -1),
            "whole": some_heads_whole(own, all_, distance, 1, 14, 1, 2),
        }
        for name, marks in kept.items():
            assert torch.equal(marks[s][:, valid[s]], alone[name][0]), name
            assert not marks[s][:, ~valid[s]].any()


def test_budgets_are_exact_and_a_short_prompt_stays_whole():
    score, valid = torch.rand(2, 3, 20), sides([20, 6], "left")
    assert observed(score, valid, 8, 4).sum(2).tolist() == [[8] * 3, [6] * 3]
    assert with_recent_share(score, valid, torch.tensor([8, 8])).sum(2).tolist() == [[8] * 3, [6] * 3]
    assert observed(score, valid, torch.tensor([[8, 9, 4], [4, 5, 6]]), 4).sum(2).tolist() == [[8, 9, 4], [4, 5, 6]]
    assert top_entries(score, valid, torch.tensor([3, 0])).sum(2).tolist() == [[3] * 3, [0] * 3]


def test_without_pooling_it_is_the_heavy_hitters():
    attention = torch.rand(1, 2, 10, 10).tril()
    score = attention.sum(2)
    kept = indices(observed(score, everything(10), 5, 2, kernel=1)[0])
    for h in range(2):
        heavy = sorted(range(8), key=lambda t, h=h: -float(attention[0, h, :, t].sum()))[:3]
        assert kept[h] == [*sorted(heavy), 8, 9]


def test_streaming_keeps_sinks_and_recent():
    assert indices(first_and_recent(sides([10, 5], "left"), 2, 3)) == [[0, 1, 7, 8, 9], [5, 6, 7, 8, 9]]
    assert indices(recent(sides([10, 5], "right"), 2)) == [[8, 9], [3, 4]]


def test_query_heads_share_their_key_value_head():
    score = torch.arange(8.0).reshape(1, 4, 2)
    assert group_heads(score, 2).tolist() == [[[1, 2], [5, 6]]]
    assert group_heads(score, 2, "max").tolist() == [[[2, 3], [6, 7]]]
    with pytest.raises(ValueError, match="kernel: expected an odd number of neighbours; found 4"):
        pooled(score, everything(2), 4)


def test_eviction_at_a_step_takes_the_lightest_old_entry():
    score = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 0.0]]])
    old = everything(4) & ~recent(everything(4), 1)
    assert indices(lightest(score, old[:, None].expand(-1, 2, -1))[0]) == [[1], [0]]
    some = torch.tensor([[[False, True, True, False], [False, False, False, False]]])
    assert indices(lightest(score, some)[0]) == [[1], []]


def test_the_bonus_of_hidden_norms_is_a_softmax_over_the_latest_image():
    hidden, latest = torch.randn(1, 9, 4), torch.zeros(1, 9, dtype=torch.bool)
    latest[0, 3:8] = True
    norm = hidden[0, 3:8].norm(dim=1)
    expected = 2 * ((norm - norm.mean()) / norm.std() / 3.5).softmax(0)
    bonus = hidden_strength(hidden.norm(dim=2), latest)
    torch.testing.assert_close(bonus[0, 3:8], expected)
    assert bonus.sum().item() == pytest.approx(2)
    even = 5.0 + 1e-7 * torch.randn(1, 9, dtype=torch.float64)
    torch.testing.assert_close(hidden_strength(even, latest), torch.where(latest, 2 / 5, 0.0))
    assert not hidden_strength(even, latest & False).any()


def test_what_the_latest_image_repeats_is_found_by_its_span():
    key = torch.randn(1, 2, 12, 6)
    latest = torch.zeros(1, 12, dtype=torch.bool)
    latest[0, 8:] = True
    key[:, :, 2] = 2 * key[:, :, 8] - key[:, :, 10]  # said again by the latest image
    residual = outside_span(key, latest, rank=3)
    for h in range(2):
        basis, _ = torch.linalg.qr(key[0, h, 8:11].T)
        expected = (key[0, h] - key[0, h] @ basis @ basis.T).norm(dim=1)
        torch.testing.assert_close(residual[0, h], expected, rtol=1e-4, atol=1e-5)
    assert residual[0, :, 2].tolist() == [0, 0] == residual[0, :, 8].tolist()
    torch.testing.assert_close(outside_span(key, latest & False), key.norm(dim=3))
    older = ~latest
    score = without_repeats(torch.ones(1, 2, 12), residual, older, 0.25)
    assert (score[0] == 0).sum(1).tolist() == [2, 2]
    assert score[0, :, 2].tolist() == [0, 0]
    assert bool((score[0, :, 8:] == 1).all())


def test_the_head_that_differs_stays_whole():
    score = torch.rand(1, 4, 64)
    value = torch.ones(1, 4, 64, 3)
    value[0, 2] = -5
    distance = semantic_distance(score, value, everything(64), 16)
    assert distance.argmax().item() == 2
    kept = some_heads_whole(score, everything(64), distance, whole=1, total=124, sinks=2, window=8)
    assert kept.sum(2).tolist() == [[20, 20, 64, 20]]
    assert bool(kept[0, :, :2].all()) and bool(kept[0, :, -8:].all())
    fewer = some_heads_whole(score, everything(64), distance, whole=3, total=124, sinks=2, window=8)
    assert fewer.sum(2).tolist() == [[20, 20, 64, 20]]  # three whole heads would not leave the others their ends


def test_task_kv_on_llama_leaves_547_middle_entries():
    score = torch.rand(1, 32, 4096)
    kept = some_heads_whole(score, everything(4096), torch.arange(32.0)[None], whole=8, total=0.4 * 32 * 4096)
    assert sorted(set(kept.sum(2)[0].tolist())) == [547 + 272, 4096]
