"""Received attention in PyTorch against the columns of the attention matrix, added up one row at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.kernels import received as module
from vlm.kernels.dispatch import Call
from vlm.kernels.received import attention_rows, attention_with_received, explain, received_attention, reference
from vlm.kernels.received.flex import received_flex
from vlm.kernels.visibility import operands

KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")
REDUCTIONS = ("sum", "max", "sumsq")
CPU, DOUBLE = torch.device("cpu"), torch.float64


def columns(q: Tensor, k: Tensor, kv_head_of: list[int], seen: Tensor, rows: Tensor, weight: Tensor, reduce: str):
    """The definition, one row after the other; ``seen`` [batch, rows, keys]."""
    received = torch.zeros(q.shape[0], q.shape[1], k.shape[2], dtype=DOUBLE)
    for b, places in enumerate(rows.tolist()):
        for h, kv in enumerate(kv_head_of):
            for i, w in zip(places, weight[b].tolist(), strict=True):
                if i < 0 or not seen[b, i].any():
                    continue
                scores = (k[b, kv].double() @ q[b, h, i].double()) * q.shape[3] ** -0.5
                p = scores.masked_fill(~seen[b, i], float("-inf")).softmax(0)
                if reduce == "max":
                    received[b, h] = torch.maximum(received[b, h], p if w > 0 else torch.zeros_like(p))
                else:
                    received[b, h] += w * p ** (2 if reduce == "sumsq" else 1)
    return received


def drawn(seed: int, batch: int, heads: tuple[int, int], rows: int, keys: int, dim: int, places: int):
    """(q, k, chosen rows, their weights): -1 and repeated rows among them, one weight 0."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], rows, dim, generator=g, dtype=DOUBLE)
    k = torch.randn(batch, heads[1], keys, dim, generator=g, dtype=DOUBLE)
    chosen = torch.randint(-1, rows, (batch, places), generator=g)
    weight = torch.rand(batch, places, generator=g, dtype=DOUBLE) + 0.1
    return q, k, chosen, weight.masked_fill(torch.arange(places) == 1, 0.0)


shapes = st.tuples(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3)]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3, 8]),
    st.integers(0, 6),
)


@settings(deadline=None, max_examples=100)
@given(
    shapes,
    st.lists(st.sampled_from(KINDS), unique=True).map(tuple),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(["reference", "torch"]),
    st.integers(1, 200),
    st.integers(0, 10_000),
)
def test_equals_the_columns_of_the_attention_matrix(draw_common, sees, shape, kinds, reduce, impl, at_once, seed):
    batch, heads, rows, keys, _, _ = shape
    q, k, chosen, weight = drawn(seed, *shape)
    common = draw_common(seed, batch, rows, keys, kinds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MOST_SCORES", at_once)
        got = received_attention(q, k, None, chosen, row_weight=weight, reduce=reduce, impl=impl, **common)
    kv_head_of = [h // (heads[0] // heads[1]) for h in range(heads[0])]
    expected = columns(q, k, kv_head_of, sees(common, batch, rows, keys), chosen, weight, reduce)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "kinds", "reduce"),
    [
        (16, (), "sum"),
        (64, ("full",), "sumsq"),
        (72, ("k_len", "q_len"), "sum"),
        (16, ("hidden", "documents"), "sumsq"),
        (16, ("positions",), "sum"),
    ],
)
def test_flex_equals_the_columns(draw_common, sees, dim, kinds, reduce):
    q, k, chosen, weight = drawn(dim, 2, (7, 1), 17, 19, dim, 5)
    common = draw_common(dim, 2, 17, 19, kinds)
    got = received_attention(q, k, None, chosen, row_weight=weight, reduce=reduce, impl="flex", **common)
    expected = columns(q, k, [0] * 7, sees(common, 2, 17, 19), chosen, weight, reduce)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch", "flex"])
def test_any_head_map_and_any_type(impl):
    q, k, chosen, weight = drawn(0, 2, (5, 3), 6, 7, 16, 4)
    kv_head_of = torch.tensor([2, 0, 0, 0, 2])
    seen = torch.ones(2, 6, 7, dtype=torch.bool).tril(1)
    common: dict[str, Any] = {"kv_head_of": kv_head_of, "impl": impl}
    types = [DOUBLE, torch.float32] if impl == "flex" else [DOUBLE, torch.float32, torch.float16, torch.bfloat16]
    for dtype in types:
        q, k = q.to(dtype), k.to(dtype)  # products of 16-bit numbers are exact, so what is received is as good as fp32
        error = 1e-12 if dtype == DOUBLE else 2e-6
        got = received_attention(q, k, None, chosen, row_weight=weight, **common)
        assert got.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
        expected = columns(q, k, kv_head_of.tolist(), seen, chosen, weight, "sum")
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=error)


@pytest.mark.parametrize(
    ("impl", "reduce"),
    [("reference", "sum"), ("torch", "sum"), ("torch", "max"), ("torch", "sumsq"), ("flex", "sum"), ("flex", "sumsq")],
)
def test_a_given_lse_is_used_as_it_is(impl, reduce):
    q, k, chosen, _ = drawn(3, 1, (2, 1), 5, 6, 16, 4)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    lse[:, :, 2] = float("-inf")  # a row that saw nothing gives nothing
    chosen[0, 0] = 2
    got = received_attention(q, k, lse + 1, chosen, reduce=reduce, causal=False, impl=impl)
    seen = torch.ones(1, 5, 6, dtype=torch.bool)
    seen[:, 2] = False
    expected = columns(q, k, [0, 0], seen, chosen, torch.ones(1, 4), reduce)
    expected = expected * torch.tensor(-1.0).exp() ** (2 if reduce == "sumsq" else 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


def test_what_is_received_sums_to_what_is_given():
    q, k, chosen, weight = drawn(5, 2, (4, 2), 8, 5, 6, 9)
    got = received_attention(q, k, None, chosen, row_weight=weight, k_len=torch.tensor([5, 2]))
    first_that_sees = torch.tensor([[3], [6]])  # 8 rows end together with 5 and with 2 keys
    total = (weight * (chosen >= first_that_sees)).sum(1)
    assert total.min() > 0
    assert total.max() < weight.sum(1).max()
    torch.testing.assert_close(got.sum(-1), total[:, None].expand(2, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_order_parts_and_repetitions_of_rows(reduce):
    q, k, chosen, weight = drawn(6, 2, (2, 2), 7, 9, 4, 6)
    once = received_attention(q, k, None, chosen, row_weight=weight, reduce=reduce)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    other = received_attention(q, k, None, chosen[:, order], row_weight=weight[:, order], reduce=reduce)
    torch.testing.assert_close(other, once, rtol=0, atol=1e-14)
    parts = [
        received_attention(q, k, None, chosen[:, part], row_weight=weight[:, part], reduce=reduce)
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.maximum(*parts) if reduce == "max" else sum(parts), once, rtol=0, atol=1e-14)
    twice = received_attention(q, k, None, chosen.repeat(1, 2), row_weight=weight.repeat(1, 2), reduce=reduce)
    torch.testing.assert_close(twice, once if reduce == "max" else 2 * once, rtol=0, atol=1e-14)


def test_one_row_is_a_row_of_dense_attention_and_later_keys_get_nothing():
    q, k, _, _ = drawn(7, 2, (4, 4), 6, 8, 5, 1)
    identity = torch.eye(8, dtype=DOUBLE).expand(2, 4, 8, 8)
    mask = torch.ones(6, 8, dtype=torch.bool).tril(2)
    attention = scaled_dot_product_attention(q, k, identity, attn_mask=mask)  # [B,H,rows,keys]
    got = received_attention(q, k, None, torch.tensor([[2], [4]]))
    torch.testing.assert_close(got, torch.stack([attention[0, :, 2], attention[1, :, 4]]), rtol=0, atol=1e-12)
    assert (got[0, :, 5:] == 0).all()
    assert (got[1, :, 7] == 0).all()
    every = received_attention(q, k, None, torch.arange(6).expand(2, -1))
    torch.testing.assert_close(every, attention.sum(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch", "flex"])
@pytest.mark.parametrize(("rows", "keys", "places"), [(2, 3, 0), (2, 0, 2), (0, 3, 2), (1, 1, 1)])
def test_nothing_and_one_token(impl, rows, keys, places):
    chosen = torch.full((1, places), -1 if rows != 1 else 0)
    got = received_attention(torch.randn(1, 2, rows, 16), torch.randn(1, 2, keys, 16), None, chosen, impl=impl)
    torch.testing.assert_close(got, torch.full((1, 2, keys), float(rows == 1)))


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients(monkeypatch, given_lse, reduce):
    monkeypatch.setattr(reference, "MOST_SCORES", 2 * 2 * 5)  # two rows at a time
    q, k, chosen, weight = drawn(8, 1, (2, 1), 4, 5, 2, 5)
    lse = [torch.rand(1, 2, 4, dtype=DOUBLE) + 2] if given_lse else []
    inputs = [x.requires_grad_() for x in (q, k, *lse)]

    def received(q: Tensor, k: Tensor, lse: Tensor | None = None) -> Tensor:
        k_len = torch.tensor([3])  # the first row sees nothing
        return received_attention(
            q, k, lse, chosen, row_weight=weight, reduce=reduce, differentiable=True, impl="torch", k_len=k_len
        )

    assert torch.autograd.gradcheck(received, inputs)
    assert not received_attention(*inputs[:2], None, chosen).requires_grad
    weight.requires_grad_()  # a constant all the same
    constants = (x.detach() for x in inputs[:2])
    assert not received_attention(*constants, None, chosen, row_weight=weight, differentiable=True).requires_grad


def test_of_equal_rows_the_first_gets_the_gradient_of_the_maximum():
    q, k, _, _ = drawn(9, 1, (1, 1), 3, 4, 3, 1)
    q[:, :, 2] = q[:, :, 1]
    lse = (q @ k.transpose(-1, -2) / 3**0.5).logsumexp(-1).requires_grad_()
    for at_once in (1, 2**20):  # in the second chunk and in the same
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "MOST_SCORES", at_once)
            chosen = torch.tensor([[2, 1]])
            got = received_attention(q, k, lse, chosen, reduce="max", differentiable=True, causal=False)
        (gradient,) = torch.autograd.grad(got.sum(), lse)
        torch.testing.assert_close(gradient, torch.tensor([[[0.0, 0.0, -1.0]]], dtype=DOUBLE))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_memory_is_chunk_times_keys(monkeypatch, reduce):
    monkeypatch.setattr(reference, "MOST_SCORES", 2 * 4 * 50)  # four rows of two heads at a time
    q, k, chosen, _ = drawn(10, 1, (2, 1), 60, 50, 2, 60)
    with Largest() as largest:
        got = received_attention(
            q.requires_grad_(), k.requires_grad_(), None, chosen, reduce=reduce, differentiable=True, impl="torch"
        )
        got.sum().backward()
    assert largest.elements <= 2 * 4 * 50


@pytest.mark.parametrize("differentiable", [False, True])
def test_attention_with_received_is_both(differentiable):
    q, k, chosen, weight = drawn(11, 2, (4, 2), 5, 7, 6, 3)
    v = torch.randn(2, 2, 7, 4, dtype=DOUBLE)
    q.requires_grad_()
    k_len = torch.tensor([7, 4])
    out, received = attention_with_received(
        q, k, v, chosen, row_weight=weight, differentiable=differentiable, k_len=k_len
    )
    mask = (torch.arange(7) <= torch.arange(5)[:, None] + (k_len - 5)[:, None, None]) & (
        torch.arange(7) < k_len[:, None, None]
    )
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    torch.testing.assert_close(out, expected.where(mask.any(-1)[:, None, :, None], 0), rtol=0, atol=1e-12)
    alone = received_attention(q, k, None, chosen, row_weight=weight, differentiable=True, k_len=k_len)
    torch.testing.assert_close(received, alone, rtol=0, atol=1e-12)
    assert received.requires_grad == differentiable
    if differentiable:  # through the log-sum-exp as well
        got, wanted = (torch.autograd.grad(r.square().sum(), q)[0] for r in (received, alone))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_what_runs_and_why():
    choice = explain(Call(CPU, torch.float32, more={"reduce": "max"}))
    assert choice.chosen == "torch"
    assert "triton" in choice.others["triton"]
    assert "maximum" in choice.others["flex"]
    assert "score matrix" in explain(Call(CPU, torch.float32)).others["flex"]
    assert "no backward" in explain(Call(CPU, torch.float32, grad=True)).others["flex"]
    cuda = explain(Call(torch.device("cuda"), torch.float64))
    assert cuda.chosen == "torch"
    assert "fp64" in cuda.others["flex"]


def test_flex_leaves_the_work_of_masked_blocks_to_the_mask():
    """The transposed visibility shows keys exactly the rows that see them, block lists included."""
    q, k, chosen, weight = drawn(12, 1, (1, 1), 300, 270, 16, 140)
    x = operands("op", q, k, None, {"k_len": torch.tensor([200])})
    got = received_flex(x, None, chosen, weight, "sum")
    expected = received_attention(q, k, None, chosen, row_weight=weight, k_len=torch.tensor([200]), impl="reference")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [[4]]}, "rows must be -1..3; found 4..4"),
        ({"rows": [0]}, r"rows must be \[batch, chosen\]; found shape \(1,\)"),
        ({"rows": [[0.0]]}, "rows must be integer; found torch.float32"),
        ({"row_weight": torch.ones(1, 2)}, r"row_weight must have shape \(1, 1\); found \(1, 2\)"),
        ({"row_weight": -torch.ones(1, 1)}, "row_weight must be finite and not negative; found -1.0"),
        ({"row_weight": torch.full((1, 1), torch.nan)}, "row_weight must be finite and not negative; found nan"),
        ({"lse": torch.zeros(1, 2, 3)}, r"lse must have shape \(1, 2, 4\); found \(1, 2, 3\)"),
        ({"reduce": "mean"}, "reduce must be one of sum, max, sumsq; found 'mean'"),
        ({"impl": "x"}, "impl must be one of auto, triton, torch, flex, reference; found 'x'"),
        ({"impl": "flex", "reduce": "max"}, "impl 'flex' cannot run this: FlexAttention gives a maximum"),
        ({"key_valid": torch.ones(1, 4)}, "key_valid must be bool"),
    ],
)
def test_bad_input_is_named(change, message):
    rows, lse = torch.tensor(change.pop("rows", [[0]])), change.pop("lse", None)
    with pytest.raises(ValueError, match=f"^{module.NAME}: {message}"):
        received_attention(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), lse, rows, **change)


def test_values_are_not_looked_at_without_validate():
    negative = received_attention(
        torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 1, 8), None, torch.tensor([[1]]),
        row_weight=torch.tensor([[-1.0]]), validate=False,
    )  # fmt: skip
    assert negative.item() == -1


def test_chosen_rows_are_the_attention_of_each():
    q, k, rows, _ = drawn(3, 2, (4, 2), 7, 9, 8, 5)
    valid = torch.arange(9) < torch.tensor([[9], [6]])
    seen = (torch.ones(7, 9, dtype=torch.bool).tril(2) & valid[:, None]).expand(2, 7, 9)
    found = attention_rows(q.requires_grad_(), k, rows, key_valid=valid)
    assert not found.requires_grad
    for place in range(5):
        row = rows[:, place : place + 1]
        expected = columns(q.detach(), k, [0, 0, 1, 1], seen, row, torch.ones(2, 1), "sum")
        torch.testing.assert_close(found[:, :, place], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"attention_rows: rows must be -1..6; found 0..7"):
        attention_rows(q, k, torch.tensor([[0, 7], [1, 2]]))
