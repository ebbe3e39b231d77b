"""Dense attention against SDPA with the mask of a loop over all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vlm.kernels import row_chunks
from vlm.kernels.dense import dense_attention, explain
from vlm.kernels.dispatch import Call

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")
IMPLS = ("flex", "sdpa", "torch", "reference")


def draw(seed, size, heads, kv_heads, value_dim=6, dtype=torch.float64):
    batch, rows, keys = size
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, 6, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, 6, generator=g, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, value_dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 2)]),
    st.lists(st.sampled_from(KINDS), unique=True).map(tuple),
    st.sampled_from([6, 3]),
    st.integers(0, 10_000),
)
def test_every_implementation_is_sdpa_with_the_mask(draw_common, sees, size, heads, kinds, value_dim, seed):
    common = draw_common(seed, *size, kinds)
    mask = sees(common, *size)[:, None]
    q, k, v = draw(seed, size, *heads, value_dim)
    head_of = torch.arange(heads[0]) // (heads[0] // heads[1])
    if heads == (3, 2):
        head_of = common["kv_head_of"] = torch.tensor([1, 0, 1])
    expected = sdpa(q, k[:, head_of], v[:, head_of], attn_mask=mask)
    lse = (q @ k[:, head_of].mT / 6**0.5).masked_fill(~mask, -torch.inf).logsumexp(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_chunks, "ROWS", 3)
        for impl in IMPLS:
            out = dense_attention(q, k, v, impl=impl, **common)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12, msg=impl)
            if impl != "sdpa":
                out, got = dense_attention(q, k, v, impl=impl, return_lse=True, **common)
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-12, msg=impl)
                torch.testing.assert_close(got, lse, rtol=0, atol=1e-12, msg=impl)


@pytest.mark.parametrize("impl", ["sdpa", "torch", "reference"])
@pytest.mark.parametrize("common", [{}, {"k_len": torch.tensor([0, 3])}, {"causal": False}])
def test_gradients_are_those_of_the_written_out_softmax(monkeypatch, impl, common):
    monkeypatch.setattr(row_chunks, "ROWS", 2)
    q, k, v = (x.requires_grad_() for x in draw(0, (2, 5, 5), 4, 2))
    upstream = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    keys = torch.arange(5)
    seen = torch.ones(2, 5, 5, dtype=torch.bool)
    if "causal" not in common:
        offset = common.get("k_len", torch.tensor([5, 5])) - 5
        seen = keys <= keys[:, None] + offset[:, None, None]
    if "k_len" in common:
        seen = seen & (keys < common["k_len"][:, None, None])
    weights = (q @ k.repeat_interleave(2, 1).mT / 6**0.5).masked_fill(~seen[:, None], -1e9).softmax(-1)
    expected = (weights * seen[:, None]) @ v.repeat_interleave(2, 1)
    expected = torch.autograd.grad(expected, (q, k, v), upstream)
    got = torch.autograd.grad(dense_attention(q, k, v, impl=impl, **common), (q, k, v), upstream)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_gradients_of_the_log_sum_exp(monkeypatch):
    monkeypatch.setattr(row_chunks, "ROWS", 2)
    inputs = [x.requires_grad_() for x in draw(1, (1, 4, 6), 2, 1)]
    common = {"key_valid": torch.tensor([[True, False, True, True, False, True]])}
    assert torch.autograd.gradcheck(lambda *x: dense_attention(*x, return_lse=True, **common), inputs)
    empty = {"k_len": torch.tensor([2])}  # rows 0 and 1 see nothing
    out, lse = dense_attention(*inputs, return_lse=True, **empty)
    (out.sum() + lse[:, :, 2:].sum()).backward()
    assert inputs[0].grad is not None
    assert (inputs[0].grad[:, :, :2] == 0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("impl", ["flex", "sdpa", "torch", "reference"])
def test_bf16_errs_no_more_than_twice_what_rounding_the_result_does(impl):
    q, k, v = draw(0, (1, 40, 40), 2, 1, dtype=torch.bfloat16)
    exact = dense_attention(*(x.double() for x in (q, k, v)), impl="reference")
    out = dense_attention(q, k, v, impl=impl)
    assert out.dtype == torch.bfloat16
    budget = 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= budget


@pytest.mark.parametrize(("rows", "keys"), [(0, 3), (3, 0)])
@pytest.mark.parametrize("impl", ["flex", "torch", "reference"])
def test_empty_sides(impl, rows, keys):
    q, k = torch.zeros(1, 2, rows, 4), torch.zeros(1, 2, keys, 4)
    out, lse = dense_attention(q, k, k, impl=impl, return_lse=True)
    assert out.shape == (1, 2, rows, 4)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (Call(CPU, torch.float32), "sdpa"),
        (Call(CPU, torch.float32, more={"plain": False}), "sdpa"),
        (Call(CPU, torch.float32, more={"lse": True}), "torch"),
        (Call(CPU, torch.float32, value_dim=32), "torch"),
        (Call(GPU, torch.bfloat16), "sdpa"),
        (Call(GPU, torch.bfloat16, dim=72, value_dim=72), "sdpa"),
        (Call(GPU, torch.bfloat16, dim=70, value_dim=35), "flex"),
        (Call(GPU, torch.float32, dim=18, value_dim=18), "flex"),
        (Call(GPU, torch.bfloat16, grad=True, more={"lse": True}), "flex"),
        (Call(GPU, torch.bfloat16, more={"plain": False}), "flex"),
        (Call(GPU, torch.bfloat16, dim=8, value_dim=8, more={"plain": False}), "torch"),
        (Call(GPU, torch.float64), "torch"),
    ],
)
def test_what_is_chosen(call, chosen):
    choice = explain(call)
    assert choice.chosen == chosen
    assert set(choice.others) == set(IMPLS) - {chosen}


@pytest.mark.bad_shape
def test_bad_input_is_named():
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="dense_attention: v must share batch, heads and keys with k"):
        dense_attention(q, k, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="impl 'sdpa' cannot run this: SDPA returns no differentiable log-sum-exp"):
        dense_attention(q, k, k, impl="sdpa", return_lse=True)
    with pytest.raises(ValueError, match="impl 'flex' cannot run this: FlexAttention has no backward on a CPU"):
        dense_attention(q.requires_grad_(), k, k, impl="flex")
    with pytest.raises(ValueError, match="impl must be one of auto, sdpa, flex, torch, reference; found 'triton'"):
        dense_attention(q, k, k, impl="triton")
