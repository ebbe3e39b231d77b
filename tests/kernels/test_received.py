"""Received attention against the full attention matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.kernels.received import received_attention


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    st.integers(1, 9),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from(["sum", "max", "sumsq"]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_equals_the_columns_of_the_attention_matrix(heads, rows, extra, causal, reduce, with_lse, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], rows, 6, generator=g, dtype=torch.float64)
    k = torch.randn(2, heads[1], rows + extra, 6, generator=g, dtype=torch.float64)
    chosen = torch.randint(-1, rows, (2, 4), generator=g)
    weight = torch.rand(2, 4, generator=g, dtype=torch.float64) + 0.1
    scores = q @ k.repeat_interleave(heads[0] // heads[1], 1).transpose(-1, -2) / 6**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(rows, rows + extra, dtype=torch.bool).tril(extra), -torch.inf)
    lse = scores.logsumexp(-1) if with_lse else None
    got = received_attention(q, k, lse, chosen, row_weight=weight, causal=causal, reduce=reduce)
    attention = scores.softmax(-1)
    expected = torch.zeros_like(got)
    for b in range(2):
        for i, w in zip(chosen[b].tolist(), weight[b].tolist(), strict=True):
            if i >= 0 and reduce == "max":
                expected[b] = torch.maximum(expected[b], attention[b, :, i])
            elif i >= 0:
                expected[b] += w * attention[b, :, i] ** (2 if reduce == "sumsq" else 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    if reduce == "sum":
        total = (weight * (chosen >= 0)).sum(1)
        torch.testing.assert_close(got.sum(-1), total[:, None].expand_as(got.sum(-1)), rtol=0, atol=1e-12)


def test_padding_keys_receive_nothing():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    valid = torch.tensor([[False, True, True, True]])
    got = received_attention(q, k, None, torch.tensor([[3, 0]]), key_valid=valid)
    assert (got[..., 0] == 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 2))  # row 0 sees only the hidden key and gives nothing


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [[4]]}, "rows must be -1..3; found 4..4"),
        ({"reduce": "mean"}, "reduce must be one of"),
        ({"impl": "x"}, "impl"),
    ],
)
def test_bad_input_is_named(change, message):
    rows = torch.tensor(change.pop("rows", [[0]]))
    with pytest.raises(ValueError, match=message):
        received_attention(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), None, rows, **change)
