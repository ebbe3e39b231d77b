"""Linear attention in Triton against the recurrence: in fp64 itself where Triton is interpreted."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.kernels.linear import linear_attention
from vlm.kernels.linear.features import feature_dim

sys.path.insert(0, str(Path(__file__).parent))
from compile_only import compiled

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.float32 if ON_GPU else torch.float64
ERROR, GRADIENT_ERROR = (1e-5, 1e-4) if ON_GPU else (1e-11, 1e-10)


def draw(seed, batch=1, heads=(2, 1), length=19, dim=5, value_dim=3, dtype=DTYPE) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    make = lambda h, d: torch.randn(batch, h, length, d, generator=g, dtype=torch.float64)  # noqa: E731
    return [x.to(DEVICE, dtype) for x in (make(heads[0], dim), make(heads[1], dim), make(heads[1], value_dim))]


def draw_decay(kind: str, k: Tensor) -> Tensor | None:
    """Log-decays, of those per token one to nothing and one so small that exp makes it nothing."""
    g = torch.Generator().manual_seed(7)
    decay = -torch.rand(k.shape[:3], generator=g, dtype=torch.float64)
    decay[..., 3:4], decay[..., -2:-1] = -torch.inf, -1e4
    chosen = {"none": None, "head": decay[0, :, 0], "token": decay}[kind]
    return None if chosen is None else chosen.to(k)


def run(inputs: list[Tensor], impl: str, **more: Any) -> list[Tensor]:
    """Output, last state and the gradients of all inputs: q, k, v, the initial state and decays that are finite."""
    q, k, v, state, *decay = (x.detach().to(x.dtype).requires_grad_() for x in inputs)
    normaliser = torch.ones(state.shape[:3], dtype=state.dtype, device=state.device)
    first = (state, normaliser) if more.get("normalize") else state
    log_decay = decay[0] if decay else None
    out, after = linear_attention(
        q, k, v, log_decay=log_decay, initial_state=first, output_state=True, impl=impl, chunk=16, **more
    )
    after = torch.cat([after[0], after[1][..., None]], -1) if isinstance(after, tuple) else after
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (out, after)]
    loss = (out * weights[0]).sum() + (after * weights[1]).sum()
    return [out, after, *torch.autograd.grad(loss, [q, k, v, state, *decay])]


def assert_equal(inputs: list[Tensor], errors: tuple[float, float] = (ERROR, GRADIENT_ERROR), **more: Any) -> None:
    truth = run([x.double() for x in inputs], "reference", **more)
    found = run(inputs, "triton", **more)
    for number, (got, expected) in enumerate(zip(found, truth, strict=True)):
        allowed = errors[number > 1] * expected.norm().clamp_min(1.0)
        assert got.shape == expected.shape and (got.double() - expected).norm() <= allowed, number


def state_for(k: Tensor, v: Tensor, feature: str = "identity") -> Tensor:
    shape = (*k.shape[:2], feature_dim(feature, k.shape[3]), v.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(k)


@pytest.mark.parametrize("kind", ["none", "head", "token"])
def test_equals_the_recurrence(kind):
    """Output, state and gradients, over a chunk border, three query heads to a key head, Dk and Dv different."""
    q, k, v = draw(0, heads=(3, 1))
    decay = draw_decay(kind, k)
    assert_equal([q, k, v, state_for(k, v), *([] if decay is None else [decay])])


def test_packed_padded_and_normalised():
    q, k, v = draw(1, batch=2, heads=(1, 1))
    valid = torch.rand(2, 19, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.2
    documents = torch.tensor([[0] * 3 + [1] * 9 + [2] * 7, [0] * 18 + [1]], device=DEVICE)
    more = {"valid": valid, "documents": documents, "normalize": True, "feature": "elu+1"}
    assert_equal([q, k, v, state_for(k, v), draw_decay("token", k)], **more)


def test_taylor_features_and_tiles_of_features_and_values():
    q, k, v = draw(2, heads=(1, 1), length=17, dim=5, value_dim=18)
    assert_equal([q, k, v, state_for(k, v, "taylor2")], feature="taylor2")


def test_fp32():
    q, k, v = draw(3, dtype=torch.float32)
    assert_equal([q, k, v, state_for(k, v), draw_decay("head", k)], (2e-6, 1e-5))


def test_gradcheck():
    if ON_GPU:
        pytest.skip("needs fp64")
    q, k, v = draw(4, heads=(1, 1), length=17, dim=2, value_dim=2)
    inputs = [q, k, v, state_for(k, v), torch.tensor([-0.3], dtype=torch.float64)]
    shapes = [x.shape for x in inputs]

    def call(joined):  # one direction through all inputs at once: a program of the interpreter takes long
        parts = joined.split([shape.numel() for shape in shapes])
        q, k, v, state, decay = (x.reshape(shape) for x, shape in zip(parts, shapes, strict=True))
        return linear_attention(
            q, k, v, log_decay=decay, initial_state=state, output_state=True, chunk=16, impl="triton"
        )

    joined = torch.cat([x.flatten() for x in inputs]).requires_grad_()
    assert torch.autograd.gradcheck(call, joined, atol=1e-8, fast_mode=True)


def test_the_state_goes_on_where_it_was_left():
    q, k, v = draw(5, heads=(1, 1), length=21)
    decay = draw_decay("token", k)
    whole, last = linear_attention(q, k, v, log_decay=decay, output_state=True, impl="triton", chunk=16)
    first = [x[:, :, :9] for x in (q, k, v, decay)]
    rest = [x[:, :, 9:] for x in (q, k, v, decay)]
    out, state = linear_attention(*first[:3], log_decay=first[3], output_state=True, impl="triton", chunk=16)
    more, after = linear_attention(
        *rest[:3], log_decay=rest[3], initial_state=state, output_state=True, impl="triton", chunk=16
    )
    torch.testing.assert_close(torch.cat([out, more], 2), whole, rtol=0, atol=ERROR)
    torch.testing.assert_close(after, last, rtol=0, atol=ERROR)


def test_any_strides_and_every_place_is_written(monkeypatch):
    """Views of [batch, length, heads, dim] and an expanded gradient; memory that is new holds nan."""
    q, k, v = draw(6, heads=(2, 2), length=17)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not turned[0].is_contiguous()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan))
    results = []
    for inputs, impl in ((turned, "triton"), ((q, k, v), "chunk")):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = linear_attention(*leaves, impl=impl, chunk=16)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=ERROR * 10)


def test_two_runs_are_equal_to_the_last_bit():
    q, k, v = draw(7, dtype=torch.float32)
    inputs = [q, k, v, state_for(k, v), draw_decay("token", k)]
    for first, second in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("length", [0, 1])
def test_hardly_any_tokens(length):
    q, k, v = draw(8, length=length)
    state = state_for(k, v)
    decay = torch.full((1,), -0.5, dtype=q.dtype, device=DEVICE)
    more = {"log_decay": decay, "initial_state": state, "output_state": True}
    for got, expected in zip(
        *(linear_attention(q, k, v, impl=i, **more) for i in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=ERROR)


def test_strong_decay_stays_finite_and_exact_nearby():
    """Levels reach thousands inside a chunk; factors come from differences and exceed nothing."""
    q, k, v = draw(9, heads=(1, 1), length=33, dtype=torch.float32)
    decay = torch.full((1, 1, 33), -1e-3, device=DEVICE)
    decay[..., ::2] = -60.0
    out = linear_attention(q, k, v, log_decay=decay, impl="triton", chunk=32)
    exact = linear_attention(*(x.double() for x in (q, k, v)), log_decay=decay.double(), impl="reference")
    assert out.isfinite().all() and (out.double() - exact).norm() < 1e-4 * exact.norm()


def test_there_is_no_second_derivative():
    q, k, v = (x.requires_grad_() for x in draw(10, heads=(1, 1), length=2))
    out = linear_attention(q, k, v, impl="triton", chunk=16)
    (grad,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_it_refuses():
    q, k, v = draw(11)
    for more, reason in (
        ({"causal": False}, "nothing to scan"),
        ({"log_decay": torch.zeros_like(k)}, "per channel"),
        ({"chunk": 24}, "chunk must be 16, 32, 64 or 128; found 24"),
    ):
        with pytest.raises(ValueError, match=f"cannot run this: .*{reason}"):
            linear_attention(q, k, v, impl="triton", **more)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_spill_nothing():
    program = """
import torch
from vlm.kernels.linear.scan import Scan
from vlm.kernels.linear.triton_backward import scan_triton
make = lambda heads, dim: torch.zeros(2, heads, 300, dim, dtype=torch.bfloat16, requires_grad=True)
q, k, v = make(4, 153), make(2, 153), make(2, 65)
decay = -torch.ones(2, 2, 300, 1, requires_grad=True)
out, _ = scan_triton(Scan(q, k, v, 0.1, torch.float32, decay, None, None, True, 64, "taylor2"))
out.sum().backward()
"""
    kernels = compiled(program)
    assert {kernel.name for kernel in kernels} == {"state_kernel", "row_kernel", "grad_state_kernel", "token_kernel"}
    assert not [kernel for kernel in kernels if kernel.spilled]
