"""Operations on batched segments, against Python's own sort and loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm.models.program.perturb import pixel_seed
from vlm.models.program.segments import (
    cosine,
    descending,
    marks,
    members,
    numbers,
    places,
    ranks,
    rows_at,
    unit,
    weighted_sums,
)

ROWS = st.lists(st.tuples(st.sampled_from([-torch.inf, 0.0, 1.0]), st.booleans()), min_size=1, max_size=9)


@given(ROWS)
def test_order_rank_number_and_place(rows):
    score, valid = torch.tensor([[s for s, _ in rows]]), torch.tensor([[v for _, v in rows]])
    own = [t for t, (_, v) in enumerate(rows) if v]
    order = sorted(own, key=lambda t: (-rows[t][0], t))
    assert descending(score, valid)[0, : len(own)].tolist() == order
    assert ranks(score, valid)[0, order].tolist() == list(range(len(own)))
    assert numbers(valid)[0, own].tolist() == list(range(len(own)))
    index, there = places(valid)
    assert index[there].tolist() == own
    assert marks(descending(score, valid), valid, torch.tensor([2]))[0].nonzero().flatten().tolist() == sorted(
        order[:2]
    )


def test_places_pad_shorter_segments_on_the_right():
    index, there = places(torch.tensor([[True, False, True], [False, True, False]]))
    assert index[there].tolist() == [0, 2, 1]
    assert there.tolist() == [[True, True], [True, False]]
    assert places(torch.zeros(2, 3, dtype=torch.bool))[0].shape == (2, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9))
def test_members_of_groups(rows):
    group, valid = torch.tensor([[g for g, _ in rows]]), torch.tensor([[v for _, v in rows]])
    index, there = members(group, valid)
    assert index.shape[1] == max(g for g, _ in rows) + 1
    for g in range(index.shape[1]):
        assert index[0, g, there[0, g]].tolist() == [t for t, row in enumerate(rows) if row == (g, True)]


@pytest.mark.parametrize("pixels", [7, 8190, 8191, 8192, 20_000])
def test_a_pixel_seed_weighs_every_pixel_by_its_place(pixels):
    images = torch.randn(2, pixels)
    for image, seed in zip(images, pixel_seed(images).tolist(), strict=True):
        bits = image.view(torch.int32).tolist()
        assert seed == sum(value * ((place + 1) % 8191) for place, value in enumerate(bits)) % 2**40


def test_marks_do_not_mind_repeats_beyond_the_count():
    order, valid = torch.tensor([[1, 1, 1]]), torch.tensor([[False, True, True]])
    assert marks(order, valid, torch.tensor([1])).tolist() == [[False, True, False]]


def test_products_do_not_see_padding_and_stay_in_their_precision():
    x = torch.randn(1, 4, 3).bfloat16()
    x[0, 3] = torch.nan
    valid = torch.tensor([[True, True, True, False]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_sums(torch.ones(1, 2, 4), x, valid)
    torch.testing.assert_close(found, x[:, :3].float().sum(1, keepdim=True).expand(-1, 2, -1).bfloat16())
    assert torch.equal(rows_at(x, torch.tensor([[2, 0]]))[0], x[0, [2, 0]])


def test_cosine_is_at_least_single_precision():
    x = torch.randn(1, 4, 3)
    expected = torch.nn.functional.cosine_similarity(x[0, :, None], x[0, None], dim=2)
    torch.testing.assert_close(cosine(x, x)[0], expected)
    assert unit(x.half()).dtype == torch.float32
    assert unit(x.double()).dtype == torch.float64
    assert unit(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_cosines_are_in_single_precision_also_in_a_training_pass():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    expected = torch.nn.functional.cosine_similarity(x.double()[:, :, None], y.double()[:, None], dim=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine(x, y)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
