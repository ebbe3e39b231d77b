"""Grouped-mass attention in Triton against its definition in fp64: in fp64 itself where Triton is interpreted."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from vlm.kernels.dispatch import Call
from vlm.kernels.grouped_mass import explain, grouped_mass_attention
from vlm.kernels.grouped_mass.rules import (
    MassFloor,
    Neutral,
    Redistribution,
    Rule,
    Static,
    sink_calibration,
    visual_redistribution,
)

sys.path.insert(0, str(Path(__file__).parent))
from compile_only import compiled

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE, ERROR = (torch.float32, 2e-5) if ON_GPU else (torch.float64, 1e-10)
KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")


class Sharpen:
    """A rule that no kernel knows, with a parameter to learn."""

    groups = 3

    def __init__(self, strength: Tensor):
        self.strength = strength

    def __call__(self, mass: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows[:, None, :, None], 1 + self.strength * mass**2, 1.0)


GAINS = [[0.5, 2.0, 0.0, 1.5], [1.0, 3.0, 0.25, 0.0]]
RULES: dict[str, Rule] = {
    "neutral": Neutral(3),
    "one group": Neutral(1),
    "static": Static.of(GAINS[0]),
    "static by head": Static.of(GAINS),
    "renormalised": Static.of(GAINS[0], renormalise=True),
    "renormalised by head": Static.of(GAINS, renormalise=True),
    "var": visual_redistribution(0.6, 0.3, 0.1),
    "act": sink_calibration(),
    "act of eight": sink_calibration(sink=7, groups=8),
    "a group counted twice": Redistribution(0.5, (1, 1), (0,), groups=3),
    "nothing to take": Redistribution(0.5, (), (1,), needed=(0,), groups=2),
    "floor": MassFloor(0.4),
    "bounded floor": MassFloor(0.9, most=1.5, groups=2),
    "any other": Sharpen(torch.tensor(0.7, dtype=torch.float64)),
}


@pytest.fixture(autouse=True, scope="module")
def language_patched_once() -> Iterator[None]:
    """Triton's interpreter patches its language in every call of a device function: half of the time, for nothing."""
    patch, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        modules = {id(m) for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)}
        if modules <= done:
            return SimpleNamespace(restore=lambda: None)
        is_kernel, scope = not done, patch(fn)
        done.update(modules)
        return SimpleNamespace(restore=lambda: (done.clear(), scope.restore())) if is_kernel else scope

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch


def draw(
    seed: int, batch: int, heads: tuple[int, int], rows: int, keys: int, dim: int = 4, value_dim: int = 3, groups=4
):
    """q, k, v as views of [batch, length, heads, dim], and group ids."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).transpose(1, 2)  # noqa: E731
    q, k = normal(batch, rows, heads[0], dim), normal(batch, keys, heads[1], dim)
    ids = torch.randint(0, groups, (batch, keys), generator=g)
    return {"q": q, "k": k, "v": normal(batch, keys, heads[1], value_dim), "group_ids": ids}


def draw_map(seed: int, given: dict[str, Any], groups: int, bias_heads: int = 1) -> dict[str, Any]:
    """A map of scores and the rows where it and the rule act."""
    g = torch.Generator().manual_seed(seed)
    (batch, heads, rows), keys = given["q"].shape[:3], given["k"].shape[2]
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) / 3  # noqa: E731
    tables = {
        "gamma": normal(heads, groups),
        "beta": normal(heads, groups),
        "key_bias": normal(batch, bias_heads, keys),
    }
    return tables | {"row_sel": torch.rand(batch, rows, generator=g) < 0.7}


def run(impl: str, given: dict[str, Any], dtype: torch.dtype, learn: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Results by name and, for what is learned, gradients for a fixed upstream of all three results."""
    call = {}
    for name, x in given.items():
        if isinstance(x, Tensor):
            x = x.to(DEVICE, dtype if x.dtype.is_floating_point else x.dtype)
        call[name] = x.detach().requires_grad_() if name in learn else x
    tensors = [call.pop(name) for name in ("q", "k", "v", "group_ids")]
    out, mass, lse = grouped_mass_attention(*tensors, impl=impl, return_lse=True, **call)
    results = {"out": out, "mass": mass, "lse": lse}
    if learn:
        g = torch.Generator().manual_seed(1)
        up = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in results.values()]
        finite = torch.where(lse.isinf(), 0, lse)
        loss = sum((x * w).sum() for x, w in zip((out, mass, finite), up, strict=True))
        inputs = dict(zip(("q", "k", "v"), tensors, strict=False)) | call
        wanted = [inputs[name] for name in learn]
        results |= {f"d {name}": x for name, x in zip(learn, torch.autograd.grad(loss, wanted), strict=True)}
    return {name: x.detach() for name, x in results.items()}


def assert_right(given: dict[str, Any], learn: tuple[str, ...] = (), dtype: torch.dtype = DTYPE, error: float = ERROR):
    got, expected = run("triton", given, dtype, learn), run("reference", given, torch.float64, learn)
    for name, x in expected.items():
        bound = error * max(1.0, float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 1.0)
        torch.testing.assert_close(got[name].double(), x, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


# Rules


def heads_for(rule: Rule) -> tuple[int, int]:
    return (2, 1) if isinstance(rule, Static) and len(rule.gains) == 2 else (1, 1)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_with_its_gradients(name):
    rule = RULES[name]
    given = draw(0, 1, heads_for(rule), 17, 20, groups=rule.groups)
    assert_right(given | {"rule": rule} | draw_map(2, given, rule.groups), ("q", "k", "v"))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_when_decoding(name):
    rule = RULES[name]
    given = draw(0, 1, heads_for(rule), 1, 70, groups=rule.groups)
    assert_right(given | {"rule": rule} | draw_map(1, given, rule.groups))


def test_what_a_rule_learns():
    given = draw(3, 1, (2, 1), 5, 6, groups=3)
    strength = {impl: torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for impl in ("triton", "reference")}
    gains = {impl: torch.rand(2, 3).double().requires_grad_() for impl in strength}
    gains["reference"].data.copy_(gains["triton"].data)
    for impl in strength:
        call = [given[name].to(DEVICE, DTYPE if name != "group_ids" else None) for name in ("q", "k", "v", "group_ids")]
        for rule in (Sharpen(strength[impl]), Static(gains[impl]), Static(gains[impl], renormalise=True)):
            out, mass = grouped_mass_attention(*call, rule=rule, impl=impl)
            ((out**2).sum() + (mass**3).sum()).backward()
    for learned in (strength, gains):
        torch.testing.assert_close(learned["triton"].grad, learned["reference"].grad, rtol=ERROR, atol=ERROR)


@pytest.mark.parametrize("name", ["var", "renormalised", "any other"])
def test_a_stopped_rule_is_a_constant(name):
    rule = RULES[name]
    given = draw(4, 1, (1, 1), 5, 6, groups=rule.groups)
    assert_right(given | {"rule": rule, "rule_grad": "stop"}, ("q", "k", "v"))


# Maps of scores


def test_gradients_of_the_map():
    given = draw(5, 2, (2, 1), 5, 18)
    learn = ("q", "k", "v", "gamma", "beta", "key_bias")
    assert_right(given | {"rule": RULES["var"]} | draw_map(5, given, 4), learn)
    assert_right(given | draw_map(5, given, 4, bias_heads=2), learn)


# Who sees whom, heads, lengths


shapes = st.tuples(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 1), (7, 1), (3, 2)]),
    st.sampled_from([1, 3, 16, 17, 20]),
    st.sampled_from([1, 2, 15, 16, 17, 33]),
    st.lists(st.sampled_from(KINDS), unique=True, max_size=3).map(tuple),
    st.sampled_from(["random", "runs", "all of one", "one is absent"]),
)


def problem(seed: int, shape: Any, draw_common: Any) -> dict[str, Any]:
    """A call with every kind of keyword: of three query heads the first and the last read the second key head."""
    batch, heads, rows, keys, kinds, layout = shape
    g = torch.Generator().manual_seed(seed)
    given = draw(seed, batch, heads, rows, keys) | draw_common(seed, batch, rows, keys, kinds)
    if layout == "runs":
        given["group_ids"] = given["group_ids"].sort(-1).values
    if layout == "all of one":
        given["group_ids"] = torch.full_like(given["group_ids"], 2)
    if layout == "one is absent":
        given["group_ids"][given["group_ids"] == 1] = 0
    if seed % 3 == 0:  # groups differ by head
        given["group_ids"] = torch.randint(0, 4, (batch, heads[0], keys), generator=g)
    if heads == (3, 2):
        given["kv_head_of"] = torch.tensor([1, 0, 1])
    return given | {"rule": RULES["var"]} | (draw_map(seed, given, 4, 1 if seed % 2 else heads[0]) if seed % 4 else {})


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(shapes, st.integers(0, 10_000))
def test_equals_the_definition(draw_common, shape, seed):
    assert_right(problem(seed, shape, draw_common))


@pytest.mark.slow
@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(shapes, st.integers(0, 10_000))
def test_gradients_equal_those_of_the_definition(draw_common, shape, seed):
    assert_right(problem(seed, shape, draw_common), ("q", "k", "v"))


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (72, 72), (80, 64), (96, 80), (128, 256), (256, 128)])
def test_head_dims(dim, value_dim):
    given = draw(6, 1, (2, 1), 3, 5, dim, value_dim)
    assert_right(given | {"rule": RULES["var"]}, ("q", "k", "v"))
    assert_right(given | {"rule": RULES["var"]})


@pytest.mark.parametrize("heads", [(7, 1), (8, 2), (3, 2)])
def test_decoding_with_heads_that_share_keys(heads):
    given = draw(7, 2, heads, 2, 40)
    given["key_valid"] = torch.arange(40) >= torch.tensor([[0], [21]])  # left padding
    if heads == (3, 2):
        given["kv_head_of"] = torch.tensor([1, 1, 0])
    assert_right(given | {"rule": RULES["static"]})


def test_packed_documents_and_permuted_positions():
    given = draw(8, 1, (1, 1), 35, 35)
    given |= {"q_doc": torch.arange(35)[None] // 18, "k_doc": torch.arange(35)[None] // 18}
    order = torch.randperm(35, generator=torch.Generator().manual_seed(8))[None]
    given |= {"q_pos": torch.arange(35)[None], "k_pos": order, "rule": RULES["floor"]}
    given["k_doc"] = given["k_doc"].gather(1, order)
    assert_right(given, ("q", "k", "v"))


KEYS = torch.arange(48)[None]
HIDDEN_TILES = {  # rows, keys that none of them sees, why
    "later": (48, slice(32, 48), {}),
    "later by position": (16, slice(16, 48), {"q_pos": KEYS[:, :16], "k_pos": KEYS}),
    "of earlier documents": (16, slice(0, 32), {"q_doc": KEYS[:, :16] * 0 + 1, "k_doc": KEYS // 32}),
    "of later documents": (16, slice(32, 48), {"q_doc": KEYS[:, :16] * 0, "k_doc": KEYS // 32, "causal": False}),
    "padding": (16, slice(0, 16), {"key_valid": KEYS >= 16}),
}


@pytest.mark.parametrize("why", HIDDEN_TILES)
def test_key_tiles_that_no_row_sees_are_not_read(why):
    rows, hidden, keywords = HIDDEN_TILES[why]
    given = draw(9, 1, (1, 1), rows, 48) | keywords
    given["v"][:, :, hidden] = torch.nan
    assert run("triton", given, DTYPE)["out"][:, :, :32].isfinite().all()


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision(dtype):
    given = draw(10, 1, (2, 1), 18, 20, 16, 16)
    bound = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    rounded = {name: x.to(dtype).double() if x.dtype.is_floating_point else x for name, x in given.items()}
    assert_right(rounded | {"rule": RULES["static"]}, ("q", "k", "v"), dtype, bound)


@pytest.mark.parametrize(
    ("name", "fast"), [("var", True), ("any other", True), pytest.param("var", False, marks=pytest.mark.slow)]
)
def test_gradcheck(name, fast):
    if ON_GPU:
        pytest.skip("fp64 runs under the interpreter")
    rule = RULES[name]
    given = draw(11, 1, (1, 1), 3, 4, 2, 2, rule.groups)
    maps = draw_map(11, given, rule.groups)
    row_sel, learned = maps.pop("row_sel"), [given[n] for n in ("q", "k", "v")] + list(maps.values())

    def call(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor):
        maps = {"gamma": gamma, "beta": beta, "key_bias": bias, "row_sel": row_sel}
        arguments = {"rule": rule, "impl": "triton", "return_lse": True, "causal": False}
        return grouped_mass_attention(q, k, v, given["group_ids"], **arguments, **maps)

    inputs = [x.detach().requires_grad_() for x in learned]
    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=fast)


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New memory holds what is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [1, 18])
def test_every_result_is_written_and_the_same_every_time(filled_memory, rows):
    assert torch.empty(2).isnan().all() and torch.ones(2, 2).t().new_empty(2).isnan().all()
    given = draw(12, 2, (1, 1), rows, 20) | {"q_len": torch.tensor([0, rows]), "k_len": torch.tensor([20, 3])}
    for name in ("var", "any other"):
        call = given | {"rule": RULES[name], "group_ids": given["group_ids"] % 3}
        learn = ("q", "k", "v") if rows > 1 else ()
        first, second = (run("triton", call, DTYPE, learn) for _ in range(2))
        for key, x in first.items():
            assert not x.isnan().any(), key
            assert torch.equal(x, second[key]), key


def test_empty_sides():
    for rows, keys in ((0, 5), (3, 0)):
        out, mass, lse = run("triton", draw(13, 2, (2, 1), rows, keys) | {"causal": False}, DTYPE).values()
        assert (out == 0).all() and (mass == 0).all() and torch.isneginf(lse).all()
        assert out.shape == (2, 2, rows, 3)


# What is kept, what is refused


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    kept: list[Tensor] = []
    given = draw(14, 1, (1, 1), 17, 18, groups=3)
    q, k, v, ids = (given[name].to(DEVICE) for name in ("q", "k", "v", "group_ids"))
    q, k, v = (x.to(DTYPE) for x in (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        for rule in (Neutral(3), RULES["any other"]):
            assert grouped_mass_attention(q, k, v, ids, rule=rule, impl="triton")[0].grad_fn is None
        assert not kept
        out, _ = grouped_mass_attention(q.detach().requires_grad_(), k, v, ids, rule=Neutral(3), impl="triton")
    assert out.grad_fn is not None and kept


def test_only_what_is_asked_for_has_a_gradient():
    given = draw(15, 1, (1, 1), 3, 4)
    for learn in (("v",), ("q",), ("k",), ("key_bias",)):
        assert_right(given | {"rule": RULES["var"]} | draw_map(15, given, 4), learn)


def test_auto_never_takes_the_interpreter_and_bf16_needs_a_gpu():
    if ON_GPU:
        pytest.skip("about the interpreter")
    assert "tests only" in explain(Call(DEVICE, torch.float32)).others["triton"]
    with pytest.raises(ValueError, match="interpreter multiplies the bits of bf16"):
        run("triton", draw(16, 1, (1, 1), 2, 3), torch.bfloat16)


# Compiled for a GPU that is not there

LAUNCHES = """
import torch
from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.grouped_mass.rules import Static, visual_redistribution
from vlm.kernels.grouped_mass.triton_autograd import grouped_mass_triton
from vlm.kernels.visibility import operands

def launch(rule, rows, keys=256, grad=False, maps=False, **common):
    new = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=grad)
    x = operands("", new(1, 4, rows, DIM), new(1, 2, keys, DIM), new(1, 2, keys, DIM), common)
    tables = [torch.zeros(4, 4, requires_grad=grad) for _ in range(2)] if maps else [None, None]
    bias = torch.zeros(1, 1, keys, requires_grad=grad) if maps else None
    ids, every = torch.zeros(1, 1, keys, dtype=torch.long), torch.ones(1, rows, dtype=torch.bool)
    out, mass, lse = grouped_mass_triton(x, Grouping(ids, rule, every, *tables, bias, False))
    if grad:
        torch.autograd.backward([out, mass, lse], [torch.zeros_like(r) for r in (out, mass, lse)])

class Other:
    groups = 4
    def __call__(self, mass, rows):
        return 1 + mass
"""
KERNELS = {"describe_keys_kernel", "describe_rows_kernel", "row_dots_kernel", "rows_kernel", "columns_kernel"}
KERNELS |= {"forward_kernel", "second_pass_kernel", "split_kernel", "combine_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_every_kernel_compiles_for_sm_90(dim):
    calls = "launch(visual_redistribution(), 1)\n"
    calls += "launch(visual_redistribution(), 128, grad=True)\n"
    calls += "launch(Other(), 128, grad=True, maps=True, k_len=torch.tensor([200]))\n"
    kernels = compiled(LAUNCHES.replace("DIM", str(dim)) + calls)
    assert {kernel.name for kernel in kernels} == KERNELS
    worst = max(kernels, key=lambda kernel: kernel.stack)
    assert worst.stack <= 400, f"{worst} keeps much outside registers"
    assert max(kernel.shared for kernel in kernels) <= 99 * 1024, "more shared memory than small GPUs have"
