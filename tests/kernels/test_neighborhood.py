"""Neighborhood attention against loops over the axes that share nothing with its window arithmetic."""

import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vlm.kernels.dispatch import Call
from vlm.kernels.neighborhood import (
    NAME,
    explain,
    neighborhood_aggregate,
    neighborhood_attention,
    neighborhood_bias,
)
from vlm.kernels.neighborhood.arguments import axes_of
from vlm.kernels.neighborhood.flex import _mask
from vlm.kernels.neighborhood.natten import natten_lacks, neighborhood_natten
from vlm.kernels.neighborhood.reference import Neighborhood
from vlm.kernels.neighborhood.tiles import tiles
from vlm.kernels.visibility import operands

CPU = torch.device("cpu")
EVERY = ["reference", "torch", "flex"]
CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def flex_untraced(monkeypatch):
    """FlexAttention on a CPU traces every shape anew, for seconds; one test below lets it."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places_along(i: int, length: int, window: int, stride: int, dilation: int, causal: bool, border: str):
    """The places of the window of coordinate i, as coordinates; None for a place that holds no key."""
    line = [j for j in range(length) if (j - i) % dilation == 0]
    me = line.index(i)
    blocks = [range(b, b + stride) for b in range(0, len(line), stride)]
    block = next(b for b in blocks if me in b)
    if causal:
        leader = min(block[-1], len(line) - 1)
        at = list(range(leader + 1 - window, leader + 1))
        return [line[p] if 0 <= p <= me else None for p in at]
    middle = block[stride // 2]
    at = list(range(middle, middle + window))
    for _ in range(window // 2):
        at = [p - 1 for p in at]
    while border == "shift" and at[-1] >= len(line):
        at = [p - 1 for p in at]
    while border == "shift" and at[0] < 0:
        at = [p + 1 for p in at]
    return [line[p] if 0 <= p < len(line) else None for p in at]


def every_place(shape, window, stride, dilation, causal, border):
    """For each token, in raster order, the token at each place of its window or None."""
    tokens = {cell: number for number, cell in enumerate(itertools.product(*map(range, shape)))}
    for cell in tokens:
        along = [
            places_along(*arguments, border)
            for arguments in zip(cell, shape, window, stride, dilation, causal, strict=True)
        ]
        yield [tokens.get(key) for key in itertools.product(*along)]


def brute(q, k, v, shape, window, *, bias=None, extra_kv=None, extra_bias=None, scale=None, **windows):
    """(out, log-sum-exp) by a dense matrix filled pair by pair."""
    repeat = q.shape[1] // k.shape[1]
    entry = torch.tensor(every_entry(shape, window, **windows))
    every = lambda x: x.repeat_interleave(repeat, 1)  # noqa: E731
    scores = q @ every(k).mT * scale
    if bias is not None:
        scores = scores + bias.flatten(1)[:, entry.clamp_min(0)]
    scores, values = scores.masked_fill(entry < 0, -torch.inf), every(v)
    if extra_kv is not None:
        more = q @ every(extra_kv[0]).mT * scale + (0 if extra_bias is None else extra_bias)
        scores, values = torch.cat([scores, more], 3), torch.cat([values, every(extra_kv[1])], 2)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def every_entry(shape, window, **windows):
    """[tokens][tokens]: which entry of the flattened bias table a pair reads, -1 where the key is not seen."""
    cells = list(itertools.product(*map(range, shape)))
    table = [[-1] * len(cells) for _ in cells]
    for i, places in enumerate(every_place(shape, window, **windows)):
        for j in (place for place in places if place is not None):
            table[i][j] = 0
            for a, b, w, d in zip(cells[i], cells[j], window, windows["dilation"], strict=True):
                table[i][j] = table[i][j] * (2 * w - 1) + (b - a) // d + w - 1
    return table


@st.composite
def grids(draw):
    """(shape, window, keywords of the windows) of a grid of up to 60 tokens."""
    most = draw(st.sampled_from([(40,), (8, 7), (4, 5, 3)]))
    border = draw(st.sampled_from(["shift", "clip"]))
    shape = [draw(st.integers(1, x)) for x in most]
    window = [draw(st.integers(1, x + 2 if border == "clip" else x)) for x in shape]
    dilation = [draw(st.integers(1, max(1, x // w))) for x, w in zip(shape, window, strict=True)]
    stride = [draw(st.integers(1, w)) for w in window]
    causal = [draw(st.booleans()) for _ in shape]
    windows = {"stride": stride, "dilation": dilation, "causal": causal}
    return tuple(shape), tuple(window), {name: tuple(x) for name, x in windows.items()} | {"border": border}


HEADS, EXTRA, SEEDS = st.sampled_from([(1, 1), (4, 2)]), st.integers(0, 2), st.integers(0, 10_000)


@settings(deadline=None, max_examples=60)
@given(grids(), HEADS, st.booleans(), EXTRA, SEEDS)
def test_reference_and_boxes_equal_the_loop(grid, heads, with_bias, extra, seed):
    equals_the_loop(["reference", "torch"], *grid, heads, with_bias, extra, seed)


@settings(deadline=None, max_examples=8)  # half a second each: FlexAttention on a CPU goes through vmap
@given(grids(), HEADS, st.booleans(), EXTRA, SEEDS)
def test_flex_equals_the_loop(grid, heads, with_bias, extra, seed):
    equals_the_loop(["flex"], *grid, heads, with_bias, extra, seed)


def equals_the_loop(impls, shape, window, windows, heads, with_bias, extra, seed):
    tokens = math.prod(shape)
    q, k, v = random(2, heads[0], tokens, 5), random(2, heads[1], tokens, 5, seed=1), random(2, heads[1], tokens, 3)
    more = {"scale": 0.7}
    if with_bias:
        more["bias"] = random(heads[0], *(2 * w - 1 for w in window), seed=seed)
    if extra:
        more["extra_kv"] = random(2, heads[1], extra, 5, seed=2), random(2, heads[1], extra, 3, seed=3)
    if extra and with_bias:
        more["extra_bias"] = random(heads[0], tokens, extra, seed=4)
    expected = brute(q, k, v, shape, window, **windows, **more)
    for impl in impls:
        got = neighborhood_attention(q, k, v, shape, window, **windows, **more, return_lse=True, impl=impl)
        torch.testing.assert_close(got, expected, **CLOSE, msg=lambda text, impl=impl: f"{impl}: {text}")


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 2, 5)])
def test_a_window_of_the_whole_grid_is_dense_attention(shape, impl):
    q, k, v = (random(1, 2, math.prod(shape), 8, seed=s) for s in range(3))
    got = neighborhood_attention(q, k, v, shape, shape, impl=impl)
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v), **CLOSE)


@pytest.mark.parametrize("impl", EVERY)
def test_a_stride_of_the_window_is_blocked_attention(impl):
    """Swin's windows without shift: 2 x 3 blocks of 3 x 2 tokens, each on its own."""
    q, k, v = (random(1, 2, 36, 8, seed=s) for s in range(3))
    blocks = lambda x: x.reshape(1, 2, 2, 3, 3, 2, 8).transpose(3, 4).reshape(1, 12, 6, 8)  # noqa: E731
    expected = scaled_dot_product_attention(blocks(q), blocks(k), blocks(v))
    expected = expected.reshape(1, 2, 2, 3, 3, 2, 8).transpose(3, 4).reshape(1, 2, 36, 8)
    torch.testing.assert_close(neighborhood_attention(q, k, v, (6, 6), (3, 2), stride=(3, 2), impl=impl), expected)


@pytest.mark.parametrize("impl", EVERY)
def test_dilation_is_one_problem_for_each_group(impl):
    """With the same relative bias in each: 2 x 3 grids of their own, not all of one size."""
    q, k, v = (random(1, 2, 9 * 11, 8, seed=s).unflatten(2, (9, 11)) for s in range(3))
    bias = random(2, 5, 5)
    got = neighborhood_attention(
        *(x.flatten(2, 3) for x in (q, k, v)), (9, 11), 3, dilation=(2, 3), bias=bias, impl=impl
    )
    for a, b in itertools.product(range(2), range(3)):
        q_, k_, v_ = (x[:, :, a::2, b::3] for x in (q, k, v))
        shape = tuple(q_.shape[2:4])
        alone = neighborhood_attention(*(x.flatten(2, 3) for x in (q_, k_, v_)), shape, 3, bias=bias, impl="reference")
        torch.testing.assert_close(got.unflatten(2, (9, 11))[:, :, a::2, b::3].flatten(2, 3), alone, **CLOSE)


@pytest.mark.parametrize("impl", EVERY)
def test_causal_in_one_dimension_is_a_sliding_window(impl):
    q, k, v = (random(1, 2, 40, 8, seed=s) for s in range(3))
    i, j = torch.arange(40)[:, None], torch.arange(40)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (i - j < 6))
    torch.testing.assert_close(neighborhood_attention(q, k, v, (40,), 6, causal=True, impl=impl), expected)


@pytest.mark.parametrize("impl", EVERY)
def test_borders_shift_or_clip(impl):
    """With equal scores the log-sum-exp counts the keys: 9 everywhere, or what lies inside the image."""
    nothing = torch.zeros(1, 1, 20, 8, dtype=torch.float64)
    count = {}
    for border in ("shift", "clip"):
        lse = neighborhood_attention(*(nothing,) * 3, (4, 5), 3, border=border, return_lse=True, impl=impl)[1]
        count[border] = lse.exp().round().int().view(4, 5)
    assert (count["shift"] == 9).all()
    rows, columns = torch.tensor([2, 3, 3, 2]), torch.tensor([2, 3, 3, 3, 2])
    assert (count["clip"] == rows[:, None] * columns).all()


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize(
    ("border", "read"),
    [("shift", [[2, 3, 4], [1, 2, 3], [1, 2, 3], [0, 1, 2]]), ("clip", [[2, 3], [1, 2, 3], [1, 2, 3], [1, 2]])],
)
def test_which_entry_of_the_bias_is_read(border, read, impl):
    bias = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]], dtype=torch.float64).log()
    nothing = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    lse = neighborhood_attention(*(nothing,) * 3, (4,), 3, border=border, bias=bias, return_lse=True, impl=impl)[1]
    expected = torch.tensor([[[sum(10.0**entry for entry in entries) for entries in read]]], dtype=torch.float64)
    torch.testing.assert_close(lse.exp(), expected)


@pytest.mark.parametrize("impl", EVERY)
def test_extra_keys_merge_two_attentions(impl):
    q, k, v = (random(1, 4, 30, 8, seed=s) for s in range(3))
    ek, ev = random(1, 4, 7, 8, seed=3), random(1, 4, 7, 8, seed=4)
    got, lse = neighborhood_attention(q, k, v, (5, 6), 3, extra_kv=(ek, ev), return_lse=True, impl=impl)
    near, near_lse = neighborhood_attention(q, k, v, (5, 6), 3, return_lse=True, impl=impl)
    far, far_lse = scaled_dot_product_attention(q, ek, ev), (q @ ek.mT / 8**0.5).logsumexp(-1)
    torch.testing.assert_close(lse, torch.logaddexp(near_lse, far_lse), **CLOSE)
    expected = near * (near_lse - lse).exp()[..., None] + far * (far_lse - lse).exp()[..., None]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("impl", EVERY)
def test_an_uneven_head_map(impl):
    q, k, v = random(1, 3, 12, 8), random(1, 2, 12, 8, seed=1), random(1, 2, 12, 8, seed=2)
    ek, ev = random(1, 2, 2, 8, seed=3), random(1, 2, 2, 8, seed=4)
    heads = torch.tensor([1, 0, 1])
    got = neighborhood_attention(q, k, v, (3, 4), 3, extra_kv=(ek, ev), kv_head_of=heads, impl=impl)
    each = [x[:, heads] for x in (k, v, ek, ev)]
    expected = neighborhood_attention(q, *each[:2], (3, 4), 3, extra_kv=(each[2], each[3]), impl="reference")
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "window", "windows"),
    [
        ((7,), (3,), {"stride": 2, "causal": True}),
        ((5, 4), (3, 2), {"dilation": (1, 2)}),
        ((2, 3, 3), (1, 3, 2), {"border": "clip", "causal": (True, False, False)}),
    ],
)
def test_gradients(shape, window, windows):
    tokens = math.prod(shape)
    shapes = [(1, 2, tokens, 3), (1, 1, tokens, 3), (1, 1, tokens, 2), (2, *(2 * w - 1 for w in window))]
    shapes += [(1, 1, 2, 3), (1, 1, 2, 2), (2, tokens, 2)]

    def run(q, k, v, bias, extra_k, extra_v, extra_bias):
        more = {"bias": bias, "extra_kv": (extra_k, extra_v), "extra_bias": extra_bias}
        return neighborhood_attention(q, k, v, shape, window, **windows, **more, return_lse=True, impl="torch")

    inputs = [random(*x, seed=s).requires_grad_() for s, x in enumerate(shapes)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@settings(deadline=None, max_examples=25)
@given(grids(), st.integers(0, 10_000))
def test_aggregate_and_bias_equal_the_loop(grid, seed):
    shape, window, windows = grid
    tokens, places = math.prod(shape), math.prod(window)
    weights, v = random(2, 3, tokens, places, seed=seed), random(2, 3, tokens, 4, seed=1)
    table = random(3, *(2 * w - 1 for w in window), seed=2)
    expected = torch.zeros_like(v)
    expected_bias = torch.full((3, tokens, places), -torch.inf, dtype=torch.float64)
    entry = every_entry(shape, window, **windows)
    for i, at in enumerate(every_place(shape, window, **windows)):
        for t, j in enumerate(at):
            if j is not None:
                expected[:, :, i] += weights[:, :, i, t, None] * v[:, :, j]
                expected_bias[:, i, t] = table.flatten(1)[:, entry[i][j]]
    torch.testing.assert_close(neighborhood_aggregate(weights, v, shape, window, **windows), expected, **CLOSE)
    torch.testing.assert_close(neighborhood_bias(table, shape, window, **windows), expected_bias, **CLOSE)


def test_gradients_of_aggregate_and_bias():
    weights, v = random(1, 2, 12, 6).requires_grad_(), random(1, 2, 12, 2, seed=1).requires_grad_()
    table = random(2, 5, 3, seed=2).requires_grad_()

    def run(weights, v, table):
        bias = neighborhood_bias(table, (3, 4), (3, 2), border="clip").clamp_min(-9)
        return neighborhood_aggregate(weights + bias, v, (3, 4), (3, 2), border="clip")

    assert torch.autograd.gradcheck(run, (weights, v, table), fast_mode=True)


def test_inputs_of_any_stride_and_half_precision():
    """[B,N,H,D] views, as a linear layer gives them; sums are in fp32, so only the inputs are rounded."""
    q, k, v = (x.transpose(1, 2) for x in random(3, 2, 49, 4, 8).bfloat16())
    bias = random(4, 5, 5).bfloat16()
    got, lse = neighborhood_attention(q, k, v, (7, 7), 3, bias=bias, return_lse=True)
    assert got.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    expected = neighborhood_attention(*(x.double() for x in (q, k, v)), (7, 7), 3, bias=bias.double(), return_lse=True)
    torch.testing.assert_close(got.double(), expected[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=2e-2)


def test_training_after_inference_on_the_same_grid():
    """The tables kept from a call in inference mode serve a later one that needs gradients."""
    q = random(1, 1, 9 * 13, 8)
    with torch.inference_mode():
        neighborhood_attention(q, q, q, (9, 13), 3)
    q.requires_grad_()
    neighborhood_attention(q, q, q, (9, 13), 3).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("dilation", [1, 8])
def test_boxes_hold_a_few_windows(dilation):
    """What a stage of NAT costs on a CPU: the keys computed for a query, of which 49 count."""
    boxes = tiles(axes_of(NAME, 56 * 56, (56, 56), 7, {"dilation": dilation}), CPU)
    computed = boxes.entries.numel() / 56**2
    assert computed <= (49 if dilation == 8 else 4 * 49)
    assert boxes.keys.numel() <= 4 * 56**2


def test_flex_can_be_traced(monkeypatch):
    """What a GPU needs: nothing in the mask and the biases that the compiler cannot follow."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    q, bias, extra_bias = random(1, 2, 20, 8), random(2, 5, 3), random(2, 20, 3)
    more = {"dilation": (1, 2), "bias": bias, "extra_kv": (random(1, 2, 3, 8),) * 2, "extra_bias": extra_bias}
    every = [neighborhood_attention(q, q, q, (4, 5), (3, 2), **more, impl=impl) for impl in ("reference", "flex")]
    torch.testing.assert_close(*every, **CLOSE)


def test_flex_brings_dilation_groups_together():
    axes = axes_of(NAME, 56 * 56, (56, 56), 7, {"dilation": 8})
    mask = _mask(axes, 0, CPU)
    full = 0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum())
    assert int(mask.kv_num_blocks.sum()) + full == 73  # of 625; in raster order 409


def test_what_runs_on_a_cpu_and_why():
    choice = explain(Call(CPU, torch.float32))
    assert choice.chosen == "torch"
    assert "score matrix" in choice.others["flex"]
    assert "natten" in choice.others["natten"]
    q = torch.zeros(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        neighborhood_attention(q, q, q, (2, 2), 2, impl="flex")
    with pytest.raises(ValueError, match="natten"):
        neighborhood_attention(q, q, q, (2, 2), 2, impl="natten")


def natten_call(grad: bool = False, **change):
    """A call as the operation makes it, that NATTEN could run unless changed."""
    parts = {
        "window": 3,
        "border": "shift",
        "bias": None,
        "extra_bias": None,
        "return_lse": False,
        "scale": 1.0,
    } | change
    axes = axes_of(NAME, 12, (3, 4), parts["window"], {"border": parts["border"]})
    n = Neighborhood(axes, parts["bias"], None, None, parts["extra_bias"], parts["return_lse"])
    return Call(CPU, torch.float32, grad, more={"neighborhood": n, "scale": parts["scale"]})


def test_what_natten_lacks():
    assert natten_lacks(natten_call()) is None
    assert natten_lacks(natten_call(return_lse=True)) is None
    for change, reason in [
        ({"bias": torch.zeros(1, 25)}, "no biases"),
        ({"extra_bias": torch.zeros(1, 12, 1)}, "no biases"),
        ({"border": "clip"}, "never clips"),
        ({"window": (3, 1)}, "2 or more"),
        ({"return_lse": True, "grad": True}, "no gradient of the log-sum-exp"),
        ({"scale": 0.0}, "scale of 0"),
    ]:
        assert reason in str(natten_lacks(natten_call(**change)))


def test_how_natten_is_called(monkeypatch):
    """A stand-in with NATTEN's signature and layout: tokens in their grid, heads last."""

    def na2d(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        additional_keys,
        additional_values,
        return_lse,
    ):
        assert query.shape == key.shape == (2, 3, 4, 4, 8)
        assert (additional_keys.shape, additional_values.shape) == ((2, 5, 4, 8), (2, 5, 4, 6))
        assert (kernel_size, stride, dilation, is_causal) == ((3, 4), (2, 1), (1, 1), (False, True))
        assert (scale, return_lse) == (0.5, True)
        return value + additional_values.sum(), query[..., 0]

    stand_in = ModuleType("natten")
    stand_in.na2d = na2d
    monkeypatch.setitem(sys.modules, "natten", stand_in)
    q, k, v = random(2, 4, 12, 8), random(2, 2, 12, 8), random(2, 2, 12, 6)
    extra = random(2, 2, 5, 8), torch.zeros(2, 2, 5, 6, dtype=torch.float64)
    axes = axes_of(NAME, 12, (3, 4), (3, 4), {"stride": (2, 1), "causal": (False, True)})
    x = operands(NAME, q, k, v, {"causal": False, "scale": 0.5})
    out, lse = neighborhood_natten(x, Neighborhood(axes, None, *extra, None, True))
    assert torch.equal(out, v.repeat_interleave(2, 1))
    assert torch.equal(lse, q[..., 0])


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 5)}, r"shape must hold the 12 tokens of the tensors; found \(3, 5\), 15"),
        ({"shape": (1, 1, 3, 4)}, r"shape must be 1 to 3 integers of 1 or more; found \(1, 1, 3, 4\)"),
        ({"shape": (12, 0)}, "shape must be 1 to 3 integers of 1 or more"),
        ({"window": (3, 5)}, r"window \* dilation must be at most the length of axis 1, 4,.*found 5 \* 1"),
        ({"dilation": (2, 1)}, r"window \* dilation must be at most the length of axis 0, 3,.*found 3 \* 2"),
        ({"window": 0}, "window must be an integer of 1 or more, or one for each of 2 axes; found 0"),
        ({"window": (3, 3, 3)}, r"window must be .* found \(3, 3, 3\)"),
        ({"window": 3.0}, "window must be an integer"),
        ({"stride": 4}, "stride must be at most the window of axis 0, 3; found 4"),
        ({"stride": True}, "stride must be an integer of 1 or more"),
        ({"causal": 1}, "causal must be a bool, or one for each of 2 axes; found 1"),
        ({"border": "wrap"}, "border must be one of shift, clip; found 'wrap'"),
        ({"bias": torch.zeros(2, 3, 3)}, r"bias must be .*\(2, 5, 5\); found \(2, 3, 3\)"),
        ({"extra_kv": (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 4, 8))}, r"extra_kv\[1\] must be \(1, 2, 5, 8\)"),
        ({"extra_bias": torch.zeros(2, 12, 1)}, "extra_bias needs extra_kv"),
        ({"k": torch.zeros(1, 2, 11, 8), "v": torch.zeros(1, 2, 11, 8)}, "k must have the 12 tokens of q; found 11"),
        ({"impl": "cuda"}, "impl must be one of auto, natten, flex, torch, reference; found 'cuda'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {name: torch.zeros(1, 2, 12, 8) for name in "qkv"} | {"shape": (3, 4), "window": 3} | change
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="unknown keyword 'strides'; the keywords of windows are stride, dilation"):
        neighborhood_attention(*(torch.zeros(1, 1, 4, 8),) * 3, (4,), 3, strides=1)


@pytest.mark.bad_shape
def test_bad_weights_are_named():
    with pytest.raises(ValueError, match=r"weights must be \(1, 2, 12, 9\).*found \(1, 2, 12, 8\)"):
        neighborhood_aggregate(torch.zeros(1, 2, 12, 8), torch.zeros(1, 2, 12, 4), (3, 4), 3)
