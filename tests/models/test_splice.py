"""Splicing visual tokens into text, against a loop over rows and places."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.models.errors import ModelError
from vlm.models.program.layout import IMAGE, PAD, TEXT
from vlm.models.splice import IMAGE_TOKEN, Visual, check_placeholders, splice

WIDTH, GRID = 3, (2, 3)


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    rows = draw(st.lists(st.text("t#", min_size=1, max_size=6), min_size=1, max_size=4))
    images = sum(row.count("#") for row in rows)
    kept = [draw(st.lists(st.booleans(), min_size=6, max_size=6)) for _ in range(images)]
    sides = st.sampled_from(["left", "right"])
    return {
        "rows": rows,
        "kept": kept,
        "side": draw(sides),
        "input_side": draw(sides),
        "seed": draw(st.integers(0, 99)),
    }


@settings(deadline=None, max_examples=80)
@given(batches())
def test_equals_a_loop_over_the_rows(case):
    g = torch.Generator().manual_seed(case["seed"])
    rows, kept, side = case["rows"], case["kept"], case["side"]
    longest = max(map(len, rows))
    tokens = torch.randint(0, 9, (len(rows), longest), generator=g)
    text_valid = torch.zeros_like(tokens, dtype=torch.bool)
    embedded = torch.randn(len(rows), longest, WIDTH, generator=g)
    features = torch.randn(len(kept), 6, WIDTH, generator=g)
    owner, expected = [], []
    for b, row in enumerate(rows):
        start = longest - len(row) if case["input_side"] == "left" else 0
        sequence = []  # (value, role, image, raster place, source)
        for t, mark in enumerate(row, start):
            text_valid[b, t] = True
            if mark == "t":
                sequence.append((embedded[b, t], TEXT, -1, -1, t))
                continue
            tokens[b, t] = IMAGE_TOKEN
            image = len(owner)
            owner.append(b)
            sequence += [(features[image, p], IMAGE, image, p, t) for p in range(6) if kept[image][p]]
        expected.append(sequence)
    valid = torch.tensor(kept, dtype=torch.bool).reshape(-1, 6)
    visual = Visual(features, GRID, torch.tensor(owner, dtype=torch.long), valid=valid)

    out, layout = splice(tokens, text_valid, embedded, visual, side)

    assert out.shape[1] == max(map(len, expected))
    for b, sequence in enumerate(expected):
        start = out.shape[1] - len(sequence) if side == "left" else 0
        inside = torch.arange(start, start + len(sequence))
        assert layout.role[b].count_nonzero() == len(sequence)
        assert (layout.role[b, inside] != PAD).all()
        assert (layout.sample[b] == b).all()
        for n, (value, role, image, raster, source) in enumerate(sequence):
            at = (b, start + n)
            assert torch.equal(out[at], value)
            assert layout.role[at] == role and layout.image[at] == image and layout.source[at] == source
            assert layout.position[at] == n
            place = (raster // 3, raster % 3) if raster >= 0 else (-1, -1)
            assert (int(layout.row[at]), int(layout.col[at])) == place


def test_places_of_features_that_were_cut_before_are_kept():
    tokens = torch.tensor([[5, IMAGE_TOKEN]])
    features = torch.arange(4.0).reshape(1, 2, 2)
    visual = Visual(features, GRID, torch.tensor([0]), place=torch.tensor([[1, 5]]))
    out, layout = splice(tokens, tokens < 9, torch.zeros(1, 2, 2), visual, "right")
    assert torch.equal(out[0, 1:], features[0])
    assert layout.row.tolist() == [[-1, 0, 1]] and layout.col.tolist() == [[-1, 1, 2]]


def test_gradients_reach_text_and_features():
    tokens = torch.tensor([[5, IMAGE_TOKEN, 6], [7, 8, 0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    embedded = torch.randn(2, 3, WIDTH, requires_grad=True)
    features = torch.randn(1, 6, WIDTH, requires_grad=True)
    out, _ = splice(tokens, valid, embedded, Visual(features, GRID, torch.tensor([0])), "left")
    out.sum().backward()
    assert features.grad is not None and embedded.grad is not None
    assert (features.grad == 1).all()
    assert embedded.grad[..., 0].tolist() == [[1, 0, 1], [1, 1, 0]]  # not the placeholder, not the padding


@pytest.mark.parametrize(
    ("owner", "keys", "message"),
    [
        ([0], ["a", "b"], "sample b: expected 0 image placeholders, one per image; found 1"),
        ([0, 1, 1], ["a", "b"], "sample b: expected 2 image placeholders, one per image; found 1"),
        ([1], [], "sample row 0: expected 0 image placeholders, one per image; found 1"),
    ],
)
def test_a_mismatch_names_the_sample(owner, keys, message):
    tokens = torch.tensor([[1, IMAGE_TOKEN, 2], [IMAGE_TOKEN, 3, 4]])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    with pytest.raises(ModelError, match=f"^{message}$"):
        check_placeholders(tokens, valid, torch.tensor(owner), keys)


def test_images_that_are_not_in_reading_order_are_refused():
    tokens = torch.tensor([[1, IMAGE_TOKEN], [IMAGE_TOKEN, 3]])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"owners must ascend; found \[1, 0\]"):
        check_placeholders(tokens, valid, torch.tensor([1, 0]), ["a", "b"])


def test_a_placeholder_id_in_the_padding_is_no_placeholder():
    tokens = torch.tensor([[1, IMAGE_TOKEN, IMAGE_TOKEN]])
    check_placeholders(tokens, torch.tensor([[True, True, False]]), torch.tensor([0]), ["a"])
