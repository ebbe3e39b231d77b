"""Division of a budget: exact, within limits, and the published codes' numbers where limits do not bind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.models.program.quota import chunk_quotas, chunks_of, crop_quotas, divide, group_sums, quotas
from vlm.models.program.select import top

PARTS = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 9)), min_size=1, max_size=6)


@given(st.integers(0, 40), PARTS)
def test_all_is_divided_within_the_limits(total, parts):
    weight, limit = [w for w, _ in parts], [n for _, n in parts]
    part = divide(total, weight, limit)
    assert sum(part) == min(total, sum(limit))
    assert all(0 <= p <= n for p, n in zip(part, limit, strict=True))
    free = [(w, p) for w, p, n in zip(weight, part, limit, strict=True) if p < n]
    assert all(p <= q for w, p in free for v, q in free if w < v)  # more weight, not less


@given(st.integers(0, 40), st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_without_limits_it_is_floors_and_one_more_for_the_largest(total, weight):
    floors = [int(total * w / sum(weight)) for w in weight]
    rest = total - sum(floors)
    for i in sorted(range(len(weight)), key=lambda i: -weight[i])[:rest]:
        floors[i] += 1
    assert divide(total, weight, [total] * len(weight)) == floors


@pytest.mark.parametrize(
    ("total", "weight", "limit", "part"),
    [
        (10, [8, 1, 1], [4, 9, 9], [4, 3, 3]),  # what the first cannot take is divided again
        (5, [1, 0, 0], [2, 9, 9], [2, 2, 1]),  # without weight: last, and then evenly
        (3, [1, 1], [9, 9], [2, 1]),  # a tie goes to the earlier
    ],
)
def test_division_by_hand(total, weight, limit, part):
    assert divide(total, weight, limit) == part


def test_chunks_are_runs_and_the_first_are_longer():
    valid = torch.ones(1, 10, dtype=torch.bool)
    assert chunks_of(valid, 4).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 3, 3]]
    assert chunks_of(valid[:, :3], 4).tolist() == [[0, 1, 2]]
    holes = torch.tensor([[True, False, True, True, False, True]])
    assert chunks_of(holes, 2)[holes].tolist() == [0, 0, 1, 1]


def test_chunk_quotas_by_hand():
    score = torch.tensor([[4.0, 4, 1, 1, 1, 1]])
    valid, chunk = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[0, 0, 1, 1, 2, 2]])
    assert group_sums(score, chunk, valid, 3).tolist() == [[8, 2, 2]]
    assert chunk_quotas(score, chunk, valid, torch.tensor([3]), 3).tolist() == [[2, 1, 0]]  # 2, .5, .5
    assert chunk_quotas(score, chunk, valid, torch.tensor([5]), 3).tolist() == [[2, 2, 1]]  # 3.3 do not fit
    padded = torch.tensor([[True, True, True, False, True, False]])
    assert chunk_quotas(score, chunk, padded, torch.tensor([4]), 3).tolist() == [[2, 1, 1]]


def test_quotas_are_those_of_each_segment():
    total, weight = torch.tensor([3, 4]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    limit = torch.tensor([[9, 9], [2, 9]])
    expected = [divide(3, [1, 2], [9, 9]), divide(4, [3, 1], [2, 9])]
    assert quotas(total, weight, limit).tolist() == expected


def test_crop_quotas_give_the_choice_of_hired(signed, golden):
    early, late = ((2 * signed(seed, 5, 2, 65, 65)).softmax(-1)[:, :, 0, 1:].sum(1) for seed in (131, 132))
    quota = crop_quotas(early[0], int(5 * 64 * 0.2), 2, 2)
    kept = top(late, torch.ones(5, 64, dtype=torch.bool), torch.tensor(quota))
    assert [row.nonzero().flatten().tolist() for row in kept] == golden["hired"]


def test_crops_as_cells_vote_where_they_lie():
    attention = torch.zeros(8, 8)
    attention[:4, 4:] = 1  # the upper right quarter
    attention[4:, :4] = 0.5
    cells = crop_quotas(attention.flatten(), 20, 2, 2, divide_by="cells")
    chunks = crop_quotas(attention.flatten(), 20, 2, 2)
    assert cells == [10, 0, 5, 5, 0]  # 32 votes: 16 each in two cells
    assert chunks == [10, 2, 2, 2, 2]  # as runs of two rows, all crops look alike
