"""Received attention in Triton against the attention matrix in fp64: in fp64 itself where Triton is interpreted."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.kernels.received import received_attention, triton_forward
from vlm.kernels.received.triton_forward import Chosen, column_pass, log_sum_exp
from vlm.kernels.visibility import operands

sys.path.insert(0, str(Path(__file__).parent))
from compile_only import compiled

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE, ERROR = (torch.float32, 1e-5) if ON_GPU else (torch.float64, 1e-12)
KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")
REDUCTIONS = ("sum", "max", "sumsq")


def attention_matrix(q: Tensor, k: Tensor, seen: Tensor, lse: Tensor | None = None, heads: Tensor | None = None):
    """[batch, heads, rows, keys] in fp64; ``heads``: key head of each query head; ``seen`` [batch, rows, keys]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if heads is None else k[:, heads]
    scores = (q.double() @ k.double().transpose(-1, -2)) * q.shape[3] ** -0.5
    scores = scores.masked_fill(~seen[:, None], -1e9)
    norm = scores.logsumexp(-1) if lse is None else lse.double()
    return torch.exp(scores - norm[..., None]) * seen[:, None]


def columns(attention: Tensor, rows: Tensor, weight: Tensor, reduce: str) -> Tensor:
    """The chosen rows of the matrix, reduced; what a place of -1 takes is set to 0."""
    chosen = torch.stack([a[:, r] * (r >= 0)[:, None] for a, r in zip(attention, rows, strict=True)])  # [B,H,R,K]
    weight = weight.double()[:, None, :, None]
    if reduce == "max":
        return (chosen * (weight > 0)).max(2).values
    return (weight * chosen ** (2 if reduce == "sumsq" else 1)).sum(2)


def drawn(seed: int, batch: int, heads: tuple[int, int], rows: int, keys: int, dim: int, places: int):
    """(q, k, chosen rows, their weights): -1 and repeated rows among them, one weight 0."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], rows, dim, generator=g, dtype=DTYPE)
    k = torch.randn(batch, heads[1], keys, dim, generator=g, dtype=DTYPE)
    chosen = torch.randint(-1, rows, (batch, places), generator=g)
    weight = torch.rand(batch, places, generator=g, dtype=DTYPE) + 0.1
    weight = weight.masked_fill(torch.arange(places) == 1, 0.0)
    return q.to(DEVICE), k.to(DEVICE), chosen.to(DEVICE), weight.to(DEVICE)


def moved(common: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in common.items()}


def triangle(rows: int, keys: int) -> Tensor:
    return torch.ones(1, rows, keys, dtype=torch.bool, device=DEVICE).tril(keys - rows)


@settings(deadline=None, max_examples=8)
@given(
    st.tuples(
        st.integers(1, 2),
        st.sampled_from([(1, 1), (2, 1)]),
        st.integers(1, 20),
        st.integers(1, 34),
        st.sampled_from([1, 3, 16, 20]),
        st.integers(1, 20),
    ),
    st.lists(st.sampled_from(KINDS), unique=True).map(tuple),
    st.sampled_from(REDUCTIONS),
    st.integers(0, 10_000),
)
def test_equals_the_columns_of_the_attention_matrix(draw_common, sees, shape, kinds, reduce, seed):
    batch, _, rows, keys, _, _ = shape
    q, k, chosen, weight = drawn(seed, *shape)
    common = draw_common(seed, batch, rows, keys, kinds)
    got = received_attention(q, k, None, chosen, row_weight=weight, reduce=reduce, impl="triton", **moved(common))
    attention = attention_matrix(q, k, sees(common, batch, rows, keys).to(DEVICE))
    torch.testing.assert_close(got, columns(attention, chosen, weight, reduce).to(DTYPE), rtol=0, atol=ERROR)


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256])
def test_head_dims(dim):
    q, k, chosen, weight = drawn(dim, 1, (1, 1), 3, 5, dim, 2)
    got = received_attention(q, k, None, chosen, row_weight=weight, impl="triton")
    expected = columns(attention_matrix(q, k, triangle(3, 5)), chosen, weight, "sum")
    torch.testing.assert_close(got, expected.to(DTYPE), rtol=0, atol=ERROR)


@pytest.mark.parametrize("heads", [[0] * 7, [1, 0, 0, 2, 0]])
def test_head_maps_and_views(heads):
    """Seven query heads on one key head; uneven groups; memory laid out [batch, length, heads, dim] is not copied."""
    q, k, chosen, weight = drawn(1, 1, (len(heads), max(heads) + 1), 4, 6, 32, 3)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    kv_head_of = torch.tensor(heads, device=DEVICE)
    got = received_attention(q, k, None, chosen, row_weight=weight, kv_head_of=kv_head_of, impl="triton")
    attention = attention_matrix(q, k, triangle(4, 6), heads=kv_head_of)
    torch.testing.assert_close(got, columns(attention, chosen, weight, "sum").to(DTYPE), rtol=0, atol=ERROR)
    assert gathered(q, k, chosen, weight, kv_head_of=kv_head_of).k.data_ptr() == k.data_ptr()


def gathered(q: Tensor, k: Tensor, chosen: Tensor, weight: Tensor, **common: Any) -> Chosen:
    return Chosen.of(operands("op", q, k, None, moved(common)), chosen, weight)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_walks_pass_every_visible_pair(draw_common, rows, keys, places, in_order, positions, seed):
    """Whatever the order of rows and the positions, no tile that holds a visible pair is skipped."""
    q, k, chosen, weight = drawn(seed, 2, (1, 1), rows, keys, 2, places)
    chosen = chosen.sort(1).values if in_order else chosen
    common = draw_common(seed, 2, rows, keys, ("positions",) if positions else ())
    rows_and_keys = gathered(q, k, chosen, weight, **common)
    seen = operands("op", q, k, None, moved(common)).seen.pick(chosen).mask()[:, 0]
    i, j = torch.arange(places, device=DEVICE), torch.arange(keys, device=DEVICE)
    over_keys, over_rows = rows_and_keys.walk_keys(), rows_and_keys.walk_rows()
    if over_keys.bound is not None:
        end = over_keys.bound[:, i // over_keys.tiles.rows]  # [B,places]
        assert not (seen & (j // over_keys.tiles.keys >= end[..., None])).any()
    if over_rows.bound is not None:
        first = over_rows.bound[:, j // over_rows.tiles.keys]  # [B,keys]
        assert not (seen & ((i // over_rows.tiles.rows)[:, None] < first[:, None])).any()
    for walk, kept, walked in ((over_keys, places, keys), (over_rows, keys, places)):
        tiles = (walk.tiles.rows, walk.tiles.keys) if walk is over_keys else (walk.tiles.keys, walk.tiles.rows)
        assert walk.grid == (2 * -(-kept // tiles[0]), walk.splits)
        assert walk.splits * walk.steps >= -(-walked // tiles[1]) > (walk.splits - 1) * walk.steps


def test_rows_in_order_walk_half_of_the_tiles():
    every = torch.arange(512, device=DEVICE)[None]
    q, k, _, weight = drawn(0, 1, (1, 1), 512, 512, 2, 512)
    rows_and_keys = gathered(q, k, every, weight)
    walk = rows_and_keys.walk_rows()
    assert walk.bound is not None
    begin = torch.arange(0, 512, walk.tiles.keys, device=DEVICE) // walk.tiles.rows
    assert walk.bound.tolist() == [begin.tolist()]
    walk = rows_and_keys.walk_keys()
    assert walk.bound is not None
    last = torch.arange(walk.tiles.rows - 1, 512, walk.tiles.rows, device=DEVICE) // walk.tiles.keys
    assert walk.bound.tolist() == [(last + 1).tolist()]
    assert gathered(q, k, every, weight, causal=False).walk_rows().bound is None


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("processors", [1, 64])
def test_a_walk_may_be_split(monkeypatch, reduce, processors):
    """The same result from one program per walk and from many; the places of maxima too, the first of equal rows."""
    monkeypatch.setattr(triton_forward, "PROCESSORS_INTERPRETED", processors)
    q, k, chosen, weight = drawn(2, 1, (1, 1), 9, 18, 4, 33)  # every row several times, in all of the tiles
    chosen[:, 0] = 8  # it sees both tiles of keys
    chosen[:, 16:32] = chosen[:, :16]
    rows_and_keys = gathered(q, k, chosen, weight)
    if not ON_GPU:
        assert rows_and_keys.walk_rows().splits == (1 if processors == 1 else 3)
        assert rows_and_keys.walk_keys().splits == (1 if processors == 1 else 2)
    lse = log_sum_exp(rows_and_keys)
    received, place = column_pass(rows_and_keys, lse, reduce, keep_place=True)
    attention = attention_matrix(q, k, triangle(9, 18))
    torch.testing.assert_close(received, columns(attention, chosen, weight, reduce).to(DTYPE), rtol=0, atol=ERROR)
    if reduce != "max":
        assert place is None
        return
    rows = torch.where((chosen >= 0) & (weight > 0), chosen, -1)[0].tolist()
    wins = [max(range(33), key=lambda r, j=j: attention[0, 0, rows[r], j] * (rows[r] >= 0)) for j in range(18)]
    expected = [rows.index(rows[r]) if attention[0, 0, rows[r], j] > 0 else -1 for j, r in enumerate(wins)]
    assert place is not None
    assert place[0, 0].tolist() == expected


def test_log_sum_exp_of_rows_that_see_nothing():
    q, k, _, weight = drawn(3, 1, (2, 1), 20, 18, 4, 3)
    chosen = torch.tensor([[-1, 1, 19]], device=DEVICE)  # row 1 stands before the first key
    lse = log_sum_exp(gathered(q, k, chosen, weight, k_len=torch.tensor([18])))
    scores = (q[0, :, 19] @ k[0, 0].T) / 2
    assert lse[0, :, :2].isneginf().all()
    torch.testing.assert_close(lse[0, :, 2], scores.logsumexp(-1), rtol=0, atol=ERROR)
    assert (
        received_attention(q, k, None, chosen[:, :2], k_len=torch.tensor([18], device=DEVICE), impl="triton") == 0
    ).all()


@pytest.mark.parametrize(("rows", "keys", "places"), [(2, 3, 0), (2, 0, 2), (0, 3, 2), (1, 1, 1)])
def test_nothing_and_one_token(rows, keys, places):
    q, k = torch.randn(1, 1, rows, 4, device=DEVICE), torch.randn(1, 1, keys, 4, device=DEVICE)
    chosen = torch.full((1, places), -1 if rows != 1 else 0, device=DEVICE)
    q.requires_grad_()
    got = received_attention(q, k, None, chosen, impl="triton", differentiable=True)
    torch.testing.assert_close(got, torch.full((1, 1, keys), float(rows == 1), device=DEVICE))
    assert (torch.autograd.grad(got.sum(), q)[0] == 0).all()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on new memory holds NaN, or an absurd place."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(torch.nan if x.dtype.is_floating_point else 10**6)

    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: poisoned(empty(*shape, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(empty_like(x, **kwargs)))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_memory_is_written_whole_and_results_repeat_bit_for_bit(monkeypatch, reduce):
    q, k, chosen, weight = drawn(4, 1, (1, 1), 5, 18, 3, 17)
    q.requires_grad_()
    k.requires_grad_()

    def results() -> list[Tensor]:
        got = received_attention(
            q, k, None, chosen, row_weight=weight, reduce=reduce, differentiable=True, impl="triton"
        )
        return [got, *torch.autograd.grad(got.square().sum(), (q, k))]

    first = results()
    poison(monkeypatch)
    assert all(torch.equal(x, y) for x, y in zip(first, results(), strict=True))


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients_are_those_of_the_matrix(sees, given_lse, reduce):
    """Uneven heads, hidden keys, a row that sees nothing, rows chosen twice, more than one tile of rows and keys."""
    q, k, chosen, weight = drawn(5, 1, (3, 2), 5, 18, 3, 17)
    kv_head_of = torch.tensor([1, 0, 1], device=DEVICE)
    valid = torch.rand(1, 18, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) < 0.8
    valid[:, :14] = False  # row 0 sees the keys up to 13
    lse = [torch.rand(1, 3, 5, dtype=DTYPE, device=DEVICE) + 2] if given_lse else []
    inputs = [x.requires_grad_() for x in (q, k, *lse)]
    got = received_attention(
        q, k, lse[0] if lse else None, chosen, row_weight=weight, reduce=reduce, differentiable=True, impl="triton",
        key_valid=valid, kv_head_of=kv_head_of,
    )  # fmt: skip
    seen = triangle(5, 18) & valid[:, None]
    attention = attention_matrix(q, k, seen, lse[0] if lse else None, kv_head_of)
    expected = columns(attention, chosen, weight, reduce)
    upstream = torch.randn(expected.shape, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=ERROR)
    mine = torch.autograd.grad((got * upstream).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    assert all(x.abs().max() > 0.01 for x in theirs)
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=10 * ERROR)


@pytest.mark.skipif(ON_GPU, reason="needs fp64, which runs interpreted only")
@pytest.mark.parametrize(("given_lse", "reduce"), [(False, "sum"), (True, "max"), (False, "sumsq")])
def test_gradcheck(given_lse, reduce):
    q, k, chosen, weight = drawn(6, 1, (2, 1), 4, 5, 3, 5)
    lse = [torch.rand(1, 2, 4, dtype=DTYPE) + 2] if given_lse else []

    def received(q: Tensor, k: Tensor, lse: Tensor | None = None) -> Tensor:
        return received_attention(
            q, k, lse, chosen, row_weight=weight, reduce=reduce, differentiable=True, impl="triton"
        )

    assert torch.autograd.gradcheck(received, [x.requires_grad_() for x in (q, k, *lse)], fast_mode=True)


def test_only_the_gradients_that_are_asked_for():
    q, k, chosen, _ = drawn(7, 1, (1, 1), 3, 4, 3, 3)
    lse = torch.ones(1, 1, 3, dtype=DTYPE, device=DEVICE, requires_grad=True)
    got = received_attention(q, k, lse, chosen, differentiable=True, impl="triton")
    got.sum().backward()
    assert lse.grad is not None
    torch.testing.assert_close(lse.grad.sum(), -got.detach().sum())
    assert not received_attention(q, k, lse, chosen, impl="triton").requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    if dtype == torch.bfloat16 and not ON_GPU:
        with pytest.raises(ValueError, match="interpreter multiplies the bits of bf16"):
            received_attention(*torch.zeros(2, 1, 1, 1, 16, dtype=dtype), None, torch.zeros(1, 1).long(), impl="triton")
        return
    q, k, chosen, weight = drawn(8, 1, (2, 1), 17, 18, 16, 5)
    q, k = q.to(dtype), k.to(dtype)
    for reduce in REDUCTIONS:
        got = received_attention(q, k, None, chosen, row_weight=weight, reduce=reduce, impl="triton")
        assert got.dtype == torch.float32
        expected = columns(attention_matrix(q, k, triangle(17, 18)), chosen, weight, reduce)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
    q, k = q.requires_grad_(), k.requires_grad_()
    got = received_attention(q, k, None, chosen, differentiable=True, impl="triton")
    expected = columns(attention_matrix(q, k, triangle(17, 18)), chosen, torch.ones_like(weight), "sum")
    mine, theirs = (torch.autograd.grad(x.square().sum(), (q, k)) for x in (got, expected))
    for x, y in zip(mine, theirs, strict=True):
        assert x.dtype == dtype
        error, size = ((z.double()).square().mean().sqrt() for z in (x - y, y))
        assert error < (1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3) * size


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor of numbers that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.numel())
        return out


def test_no_rows_times_keys_of_memory():
    q, k, chosen, _ = drawn(9, 1, (1, 1), 48, 48, 1, 48)
    q, k = q.requires_grad_(), k.requires_grad_()
    with Largest() as largest:
        got = received_attention(q, k, None, chosen, differentiable=True, impl="triton")
        got.sum().backward()
    assert largest.elements < 48 * 48


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_keep_to_its_registers():
    kernels = compiled(
        "import torch\n"
        "from vlm.kernels.received.triton_backward import received_triton\n"
        "from vlm.kernels.visibility import operands\n"
        "for places, reduce in ((1, 'max'), (640, 'sum')):\n"
        "    q = torch.zeros(1, 4, 640, 128, dtype=torch.bfloat16, requires_grad=True)\n"
        "    k = torch.zeros(1, 2, 640, 128, dtype=torch.bfloat16, requires_grad=True)\n"
        "    x, rows = operands('op', q, k, None, {}), torch.arange(640 - places, 640)[None]\n"
        "    received_triton(x, None, rows, torch.ones(1, places), reduce).sum().backward()\n"
    )
    names = ("column_pass", "log_sum_exp", "row_totals", "query_gradient", "key_gradient")
    assert {kernel.name for kernel in kernels} == {f"_{name}_kernel" for name in names}
    assert not any(kernel.spilled for kernel in kernels)
