"""Which implementation is chosen, and the reason that is given for every other."""

import pytest
import torch

from vlm.kernels import dispatch
from vlm.kernels.dispatch import Call, Implementation, any_of, choose, explain, lazy

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def on_gpu(call: Call) -> str | None:
    return None if call.device.type == "cuda" else "needs a GPU"


def small(call: Call) -> str | None:
    return "rows are few" if call.rows < 10 else None


def run(*_):
    return "ran"


IMPLEMENTATIONS = (
    Implementation("fused", run, on_gpu),
    Implementation("tiled", run, passed_over=small),
    Implementation("plain", run),
)


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (Call(GPU, torch.float32), "fused"),
        (Call(CPU, torch.float32), "tiled"),
        (Call(CPU, torch.float32, rows=3), "plain"),
    ],
)
def test_auto_takes_the_first_that_runs_and_is_not_passed_over(call, chosen):
    assert choose("op", IMPLEMENTATIONS, "auto", call).name == chosen
    assert explain("op", IMPLEMENTATIONS, call).chosen == chosen


def test_a_named_one_runs_though_it_is_passed_over_but_not_where_it_is_blocked():
    call = Call(CPU, torch.float32, rows=3)
    assert choose("op", IMPLEMENTATIONS, "tiled", call).run() == "ran"
    with pytest.raises(ValueError, match="op: impl 'fused' cannot run this: needs a GPU"):
        choose("op", IMPLEMENTATIONS, "fused", call)
    with pytest.raises(ValueError, match="op: impl must be one of auto, fused, tiled, plain; found 'fast'"):
        choose("op", IMPLEMENTATIONS, "fast", call)


def test_nothing_that_runs_says_every_reason():
    with pytest.raises(ValueError, match=r"op: no implementation .*fused: needs a GPU; tiled: rows are few"):
        choose("op", IMPLEMENTATIONS[:2], "auto", Call(CPU, torch.float32, rows=3))


def test_explain_says_why_each_other_is_not_chosen():
    assert explain("op", IMPLEMENTATIONS, Call(CPU, torch.float32, rows=3)).others == {
        "fused": "needs a GPU",
        "tiled": "rows are few",
    }
    assert explain("op", IMPLEMENTATIONS, Call(CPU, torch.float32)).others == {
        "fused": "needs a GPU",
        "plain": "tiled comes first",
    }


def test_a_call_knows_its_tensors():
    q, k, v = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 4)
    assert Call.of(q, k, v, None, fn="exp") == Call(CPU, torch.float32, False, 8, 4, 3, 5, {"fn": "exp"})
    assert Call.of(q, k).value_dim == 8
    gate = torch.zeros(2, requires_grad=True)
    assert Call.of(q, k, v, gate).grad
    with torch.no_grad():
        assert not Call.of(q, k, v, gate).grad


def test_reasons_and_imports_wait_until_they_are_asked_for():
    first = any_of(on_gpu, small)
    assert first(Call(CPU, torch.float32, rows=3)) == "needs a GPU"
    assert first(Call(GPU, torch.float32, rows=3)) == "rows are few"
    assert first(Call(GPU, torch.float32)) is None
    absent = lazy("vlm.kernels.there_is_no_such_module", "run")
    with pytest.raises(ModuleNotFoundError):
        absent()
    assert lazy("math", "gcd")(12, 18) == 6


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call(CPU, torch.float32), None),
        (Call(CPU, torch.float64, dim=4), None),
        (Call(CPU, torch.float32, grad=True), "no backward on a CPU"),
        (Call(GPU, torch.bfloat16, grad=True), None),
        (Call(GPU, torch.bfloat16, dim=8), "16 or more on CUDA; found 8"),
        (Call(GPU, torch.bfloat16, value_dim=8), "16 or more on CUDA; found 8"),
        (Call(GPU, torch.float64), "no fp64"),
        (Call(torch.device("mps"), torch.float32), "found mps"),
    ],
)
def test_what_flex_attention_needs(call, reason):
    found = dispatch.needs_flex(call)
    assert found is None if reason is None else reason in str(found)
    assert (dispatch.slow_on_cpu(call) is None) == (call.device.type != "cpu")


@pytest.mark.parametrize(
    ("interpreting", "call", "reason"),
    [
        (False, Call(GPU, torch.bfloat16), None),
        (False, Call(CPU, torch.float32), "needs a CUDA device, or TRITON_INTERPRET=1; found cpu"),
        (False, Call(GPU, torch.float64), "fp64"),
        (False, Call(GPU, torch.float16, value_dim=257), "head dims up to 256; found 257"),
        (True, Call(CPU, torch.float64), None),
        (True, Call(CPU, torch.bfloat16), "bf16"),
    ],
)
def test_what_triton_needs(monkeypatch, interpreting, call, reason):
    monkeypatch.setattr(dispatch, "interpreting", lambda: interpreting)
    found = dispatch.needs_triton(call)
    assert found is None if reason is None else reason in str(found)
    assert (dispatch.only_for_tests(call) is not None) == interpreting


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert not dispatch.interpreting()
    assert dispatch.needs_triton(Call(GPU, torch.bfloat16)) == "triton is not installed"
