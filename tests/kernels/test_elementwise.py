"""Elementwise attention against its sum, one row and one key at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.kernels import row_chunks
from vlm.kernels.dispatch import Call
from vlm.kernels.elementwise import elementwise_attention, explain

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")
WEIGHT = {
    "sigmoid": lambda s: 1 / (1 + math.exp(-s)),
    "exp": lambda s: math.exp(min(s, 5.0)),
    "relu": lambda s: max(s, 0.0),
}


def draw(seed, size, heads, kv_heads):
    batch, rows, keys = size
    g = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(batch, heads, rows, 4, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, 4, generator=g, dtype=torch.float64)
    return q, k, torch.randn(batch, kv_heads, keys, 3, generator=g, dtype=torch.float64)


def one_by_one(q, k, v, fn, bias, normalizer, mask, own):
    """``own``: the mask without causality, whose rows count the keys of a row's own sample."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    ratio = q.shape[1] // k.shape[1]
    for b, h, i in ((b, h, i) for b in range(len(q)) for h in range(q.shape[1]) for i in range(q.shape[2])):
        number = -math.log(max(int(own[b, i].sum()), 1)) if bias == "-logn" else float(bias[h])
        for j in mask[b, i].nonzero()[:, 0].tolist():
            score = float(q[b, h, i] @ k[b, h // ratio, j]) / 2 + number
            out[b, h, i] += WEIGHT[fn](score) * v[b, h // ratio, j]
        if normalizer == "count":
            out[b, h, i] /= max(int(mask[b, i].sum()), 1)
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([(1, 1), (4, 2)]),
    st.lists(st.sampled_from(KINDS), unique=True).map(tuple),
    st.sampled_from(["sigmoid", "exp", "relu"]),
    st.booleans(),
    st.sampled_from(["none", "count"]),
    st.integers(0, 10_000),
)
def test_every_implementation_is_the_sum(draw_common, sees, size, heads, kinds, fn, by_length, normalizer, seed):
    common = draw_common(seed, *size, kinds)
    q, k, v = draw(seed, size, *heads)
    bias = "-logn" if by_length else torch.linspace(-1, 1, heads[0], dtype=torch.float64)
    masks = sees(common, *size), sees(common | {"causal": False}, *size)
    expected = one_by_one(q, k, v, fn, bias, normalizer, *masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_chunks, "ROWS", 2)
        for impl in ("torch", "reference") if fn == "relu" else ("flex", "torch", "reference"):
            got = elementwise_attention(q, k, v, fn=fn, bias=bias, normalizer=normalizer, impl=impl, **common)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=impl)


def test_biases():
    q, k, v = draw(0, (1, 3, 8), 2, 1)
    every = lambda **how: elementwise_attention(q, k, v, causal=False, **how)  # noqa: E731
    torch.testing.assert_close(every(), every(bias=-math.log(8)), rtol=0, atol=1e-15)
    torch.testing.assert_close(every(fn="exp"), every(fn="exp", bias=0.0), rtol=0, atol=0)
    torch.testing.assert_close(every(bias=0.5), every(bias=torch.tensor([0.5, 0.5]).double()), rtol=0, atol=1e-15)
    assert every(bias=-1e3).abs().max() == 0
    assert elementwise_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16


def test_packed_samples_are_as_if_alone():
    q, k, v = draw(1, (1, 7, 7), 2, 2)
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    packed = elementwise_attention(q, k, v, q_doc=document, k_doc=document)
    for part in (slice(0, 3), slice(3, 7)):
        alone = elementwise_attention(q[:, :, part], k[:, :, part], v[:, :, part])
        torch.testing.assert_close(packed[:, :, part], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fn", ["sigmoid", "exp", "relu"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients_are_exact(monkeypatch, fn, impl):
    monkeypatch.setattr(row_chunks, "ROWS", 2)
    inputs = [x.requires_grad_() for x in draw(2, (1, 3, 4), 2, 1)]
    bias = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, False, True, True]])

    def run(q, k, v, bias):
        return elementwise_attention(
            q, k, v, fn=fn, bias=bias, normalizer="count", impl=impl, key_valid=valid, scale=2.0
        )

    scores = 2 * inputs[0] @ inputs[1].mT + bias[:, None, None]
    assert (scores > 5).any()  # the clamp of exp is at work
    assert torch.autograd.gradcheck(run, (*inputs, bias))


def test_what_is_chosen():
    assert explain(Call(CPU, torch.float32)).chosen == "torch"
    assert explain(Call(GPU, torch.bfloat16, grad=True, more={"fn": "exp"})).chosen == "flex"
    choice = explain(Call(GPU, torch.bfloat16, more={"fn": "relu"}))
    assert choice.chosen == "torch"
    assert choice.others == {
        "flex": "the log of relu is -inf with no gradient",
        "reference": "torch comes first",
    }


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fn": "gelu"}, "fn must be one of sigmoid, exp, relu; found 'gelu'"),
        ({"normalizer": "sum"}, "normalizer must be one of none, count; found 'sum'"),
        ({"bias": "logn"}, "bias must be '-logn', a number or one per head; found 'logn'"),
        ({"bias": math.inf}, "bias must be finite; found inf"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(2,\); found \(3,\)"),
        ({"bias": torch.tensor([0.0, math.nan])}, "bias must be finite; found nan"),
        ({"impl": "flex", "fn": "relu"}, "impl 'flex' cannot run this: the log of relu"),
    ],
)
def test_bad_input_is_named(change, message):
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"elementwise_attention: {message}"):
        elementwise_attention(q, q, q, **change)
