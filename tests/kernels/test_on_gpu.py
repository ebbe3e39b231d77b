"""Every implementation on a GPU, in the types it will run in, against the definition in fp64. Run by ``tools/gpu``.

An implementation may be twice as far from the fp64 truth as the definition itself is in the same low precision (three
times for gradients), and no further.
"""

import pytest
import torch

from vlm.kernels import dense, elementwise, grouped_mass, linear, neighborhood, received, sparse
from vlm.kernels.dispatch import Call
from vlm.kernels.grouped_mass.rules import MassFloor, Static, sink_calibration, visual_redistribution
from vlm.kernels.sparse.lists import BlockLists

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = ((1, 4, 4, 64), (2, 7, 1, 128), (1, 28, 4, 128), (1, 4, 2, 80), (1, 2, 2, 72), (1, 2, 1, 256))
LENGTHS = ((1, 1), (1, 700), (16, 640), (257, 257), (640, 640), (33, 129))


def groups(k):
    keys = torch.arange(k.shape[2], device=k.device)
    group = torch.where((keys > 5) & (keys < k.shape[2] * 2 // 3), 1, 0)
    group = torch.where((group == 1) & (keys % 37 == 0), 2, group)
    return torch.where(keys == 0, 3, group).expand(k.shape[0], -1)


def grouped(rule, **more):
    return lambda q, k, v, impl: grouped_mass.grouped_mass_attention(
        q, k, v, groups(k), rule=rule, impl=impl, return_lse=True, **more
    )


def act(q, k, v, impl):
    """Groups that differ by head."""
    keys = torch.arange(k.shape[2], device=k.device)
    heads = torch.arange(q.shape[1], device=k.device)
    group = ((keys[None] + heads[:, None]) % 11 == 0).long().expand(q.shape[0], -1, -1)
    return grouped_mass.grouped_mass_attention(q, k, v, group, rule=sink_calibration(), impl=impl)


def pai(q, k, v, impl):
    last = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    last[:, -1] = True
    gamma = torch.zeros(q.shape[1], 4, device=q.device)
    gamma[:, 1] = 0.2
    return grouped_mass.grouped_mass_attention(q, k, v, groups(k), row_sel=last, gamma=gamma, impl=impl)


def python_rule(mass, rows):
    return 1 + mass * (1 - mass)


python_rule.groups = 4

RULES = {
    "neutral": grouped("neutral"),
    "static": grouped(Static.of([1.0, 1.5, 0.5, 1.0])),
    "renormalised": grouped(Static.of([1.0, 1.5, 0.5, 1.0], renormalise=True)),
    "var": grouped(visual_redistribution(image_min=0.0, rho=0.0)),
    "floor": grouped(MassFloor(0.8)),
    "python": grouped(python_rule),
    "act": act,
    "pai": pai,
}


def draw(heads, lengths, dtype, grad=False):
    batch, q_heads, kv_heads, dim = heads
    g = torch.Generator(device="cuda").manual_seed(0)
    make = lambda h, n: torch.randn(batch, h, n, dim, generator=g, device="cuda").to(dtype)  # noqa: E731
    q, k, v = make(q_heads, lengths[0]), make(kv_heads, lengths[1]), make(kv_heads, lengths[1])
    return [x.requires_grad_(grad) for x in (q, k, v)]


def close(found, rough, truth, factor, dtype):
    for got, low, exact in zip(found, rough, truth, strict=True):
        got, low = got.double(), low.double()
        finite = exact.isfinite()
        assert torch.equal(got.isfinite(), finite)
        scale = exact[finite].abs().max() if finite.any() else exact.new_tensor(0.0)
        allowed = factor * ((low - exact)[finite].abs().amax() + torch.finfo(dtype).eps * scale) + 1e-5
        assert (got - exact)[finite].abs().max() <= allowed


def implementations(module, q, k, v, **more):
    """Names of the implementations that can run this call, but the reference."""
    call = Call.of(q, k, v, **more)
    return [i.name for i in module.IMPLEMENTATIONS if i.name not in ("reference", "fla") and not i.blocked(call)]


def compare(run, q, k, v, impl, factor=2.0):
    exact = run(*(x.detach().double() for x in (q, k, v)), "reference")
    rough = run(*(x.detach() for x in (q, k, v)), "reference")
    found = run(q, k, v, impl)
    close([x.detach() for x in found], rough, exact, factor, q.dtype)


def gradients(run, q, k, v, impl):
    weight = None
    results = []
    for dtype, how in ((torch.float64, "reference"), (q.dtype, "reference"), (q.dtype, impl)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = run(*inputs, how)[0]
        weight = torch.randn_like(out, dtype=torch.float32) if weight is None else weight
        results.append(torch.autograd.grad(out, inputs, weight.to(out.dtype)))
    close(results[2], results[1], results[0], 3.0, q.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "flex", "torch"])
@pytest.mark.parametrize("rule", RULES)
def test_grouped_mass(rule, impl, dtype):
    for heads in HEADS:
        for lengths in LENGTHS:
            compare(RULES[rule], *draw(heads, lengths, dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "flex", "torch"])
@pytest.mark.parametrize("rule", ["neutral", "static", "var", "floor", "python", "act"])
def test_gradients_of_grouped_mass(rule, impl, dtype):
    for heads in HEADS:
        gradients(RULES[rule], *draw(heads, (257, 257), dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("reduce", received.REDUCTIONS)
@pytest.mark.parametrize("known", [True, False])
def test_received(reduce, known, impl, dtype):
    for heads in HEADS:
        for rows, keys in LENGTHS:
            q, k, v = draw(heads, (rows, keys), dtype)
            chosen = torch.randint(-1, rows, (q.shape[0], 6), device="cuda")

            def run(q, k, v, impl, chosen=chosen):
                lse = dense.dense_attention(q, k, v, return_lse=True, impl="reference")[1] if known else None
                return (received.received_attention(q, k, lse, chosen, reduce=reduce, impl=impl),)

            compare(run, q, k, v, impl)


@pytest.mark.parametrize("impl", ["triton", "flex", "torch"])
def test_gradients_of_received(impl):
    q, k, v = draw((1, 4, 2, 64), (129, 129), torch.float32)
    rows = torch.arange(100, 129, device="cuda")[None]
    run = lambda q, k, v, impl: (  # noqa: E731
        received.received_attention(q, k, None, rows, differentiable=True, impl=impl) ** 2 + 0 * v.sum(),
    )
    gradients(run, q, k, v, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_other_operations(dtype):
    for heads in HEADS:
        q, k, v = draw(heads, (640, 640), dtype)
        table = torch.rand(1, 1, 5, 5, device="cuda") < 0.5
        lists = BlockLists.from_table(table | torch.eye(5, dtype=torch.bool, device="cuda"), 128, 128)
        runs = {
            dense: lambda q, k, v, impl: (dense.dense_attention(q, k, v, impl=impl),),
            elementwise: lambda q, k, v, impl: (elementwise.elementwise_attention(q, k, v, impl=impl),),
            sparse: lambda q, k, v, impl, lists=lists: (sparse.block_sparse_attention(q, k, v, lists, impl=impl),),
            neighborhood: lambda q, k, v, impl: (
                neighborhood.neighborhood_attention(q, k, v, (20, 32), (7, 9), impl=impl),
            ),
        }
        for module, run in runs.items():
            for impl in implementations(module, q, k, v):
                compare(run, q, k, v, impl)
                gradients(run, q, k, v, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    for heads in HEADS:
        q, k, v = draw(heads, (300, 300), dtype)
        decay = -torch.linspace(0.01, 0.2, k.shape[1], device="cuda")
        run = lambda q, k, v, impl, d=decay: (linear.linear_attention(q, k, v, log_decay=d, impl=impl),)  # noqa: E731
        for impl in ("triton", "chunk"):
            compare(run, q, k, v, impl, factor=4.0)  # states pass through many sums
            gradients(run, q, k, v, impl)


def test_long_rows_against_rows_computed_one_by_one():
    q, k, v = draw((1, 28, 4, 128), (16896, 16896), torch.bfloat16)
    group = groups(k)
    out, mass = grouped_mass.grouped_mass_attention(q, k, v, group, impl="triton")
    for row in torch.randint(0, 16896, (64,)).tolist():
        one = (x.double() for x in (q[:, :, row : row + 1], k[:, :, : row + 1], v[:, :, : row + 1]))
        exact, exact_mass = grouped_mass.grouped_mass_attention(*one, group[:, : row + 1], impl="reference")
        assert (out[:, :, row : row + 1].double() - exact).abs().max() < 2e-2 * exact.abs().max().clamp_min(0.1)
        assert (mass[:, :, row : row + 1].double() - exact_mass).abs().max() < 1e-4


def test_nothing_of_rows_by_keys_is_allocated():
    q, k, v = draw((1, 8, 8, 128), (8192, 8192), torch.bfloat16)
    rows = torch.arange(8192, device="cuda")[None]
    limit = 8 * 8192 * 8192 // 4  # bytes: an eighth of the score matrix in bf16
    lse = dense.dense_attention(q, k, v, return_lse=True)[1]
    for run in (
        lambda: grouped_mass.grouped_mass_attention(q, k, v, groups(k), rule=visual_redistribution()),
        lambda: received.received_attention(q, k, lse, rows),
        lambda: dense.dense_attention(q, k, v),
        lambda: linear.linear_attention(q, k, v),
    ):
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.max_memory_allocated() - before < limit


def test_two_runs_are_equal_to_the_bit():
    q, k, v = draw((2, 8, 2, 128), (640, 640), torch.bfloat16, grad=True)
    results = []
    for _ in range(2):
        out = RULES["var"](q, k, v, "triton")
        results.append([*out, *torch.autograd.grad(out[0].float().square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
