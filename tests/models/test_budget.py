"""How a recipe says what a pruner may keep."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vlm.models.program.budget import Budget


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        ("25%", Budget(ratio=0.25)),
        ("12.5%", Budget(ratio=0.125)),
        ("0.25", Budget(ratio=0.25)),
        (0.25, Budget(ratio=0.25)),
        (" 25% ", Budget(ratio=0.25)),
        ("100%", Budget(ratio=1.0)),
        (1.0, Budget(ratio=1.0)),
        ("1.0", Budget(ratio=1.0)),
        (1, Budget(tokens=1)),
        ("1", Budget(tokens=1)),
        (64, Budget(tokens=64)),
        ("64", Budget(tokens=64)),
        (Budget(tokens=3), Budget(tokens=3)),
    ],
)
def test_parse(value, budget):
    assert Budget.parse(value) == budget


@pytest.mark.parametrize(
    "value", ["0%", "101%", 0, -1, "0", "0.0", 1.5, "-25%", "nan", "inf", "many", "", "%", True, "²", None]
)
def test_parse_refuses(value):
    with pytest.raises(ValueError, match=r"expected a share such as 25% or 0.25, or a number of tokens"):
        Budget.parse(value)


@pytest.mark.parametrize(
    ("keep", "tokens", "images", "count"),
    [
        ("25%", [36, 0, 72, 2, 1], [1, 0, 2, 1, 1], [9, 0, 18, 1, 1]),
        (9, [36, 0, 72, 4], [1, 0, 2, 1], [9, 0, 18, 4]),
        ("100%", [36, 5], [1, 1], [36, 5]),
        ("50%", [577], [1], [288]),
        ("9.8%", [576], [1], [56]),  # DivPrune's number
    ],
)
def test_count(keep, tokens, images, count):
    assert Budget.parse(keep).count(torch.tensor(tokens), torch.tensor(images)).tolist() == count


@example(150, 1, 7)  # 10.5 in single precision, 10.500000000000002 in double
@given(st.integers(0, 3000), st.integers(1, 5), st.integers(1, 100))
def test_the_number_and_the_tensor_agree(tokens, images, percent):
    budget = Budget.parse(f"{percent}%")
    count = budget.count(torch.tensor([tokens]), torch.tensor([images])).item()
    assert count == budget.of(tokens, images)
    assert min(tokens, 1) <= count <= tokens
    assert abs(count - tokens * percent / 100) <= 1


def test_only_a_full_share_is_known_to_keep_everything():
    assert Budget.parse("100%").everything and not Budget.parse(9999).everything
    assert [str(Budget.parse(value)) for value in ("25%", 64, "12.5%")] == ["25%", "64", "12.5%"]
