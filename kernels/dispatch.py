"""Which implementation of an operation runs, and why the others do not.

Every operation lists its implementations best first. Each says of a call why it cannot run it (``blocked``) and why,
though it could, it is not chosen unless named (``passed_over``: slower there, meant for tests). There is no silent
fallback: a named implementation that cannot run raises, ``"auto"`` takes the first that can and is not passed over,
and :func:`explain` says all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What decides which implementation can run: where, on what type and head dim, whether gradients are asked for.

    ``dim`` and ``value_dim`` are the sizes of a head; ``more`` is what else an operation lets its implementations
    know, by name (the rule, the reduction, the feature map).
    """

    device: torch.device
    dtype: torch.dtype
    grad: bool = False
    dim: int = 64
    value_dim: int = 64
    rows: int = 1024
    keys: int = 1024
    more: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor | None = None, *others: Tensor | None, **more: Any) -> "Call":
        """The call with these tensors; gradients are asked for if any of them needs one and autograd records."""
        tensors = [x for x in (q, k, v, *others) if x is not None]
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        value_dim = q.shape[-1] if v is None else v.shape[-1]
        return Call(q.device, q.dtype, grad, q.shape[-1], value_dim, q.shape[-2], k.shape[-2], more)


Reason = Callable[[Call], str | None]


def never(call: Call) -> str | None:
    return None


class Implementation(NamedTuple):
    """One way to compute an operation; ``blocked`` and ``passed_over`` give None or the reason in a few words."""

    name: str
    run: Callable
    blocked: Reason = never
    passed_over: Reason = never


class Choice(NamedTuple):
    """What :func:`explain` returns: the chosen name, and for every other implementation the reason."""

    chosen: str
    others: dict[str, str]


def choose(op: str, implementations: Sequence[Implementation], impl: str, call: Call) -> Implementation:
    """The implementation that ``impl`` names, or for ``"auto"`` the first that runs ``call`` and is not passed over.

    Raises ValueError naming the operation when ``impl`` is unknown or cannot run the call.
    """
    if impl == "auto":
        for candidate in implementations:
            if candidate.blocked(call) is None and candidate.passed_over(call) is None:
                return candidate
        reasons = "; ".join(f"{c.name}: {c.blocked(call) or c.passed_over(call)}" for c in implementations)
        raise ValueError(f"{op}: no implementation can run this ({reasons})")
    for candidate in implementations:
        if candidate.name == impl:
            reason = candidate.blocked(call)
            if reason is not None:
                raise ValueError(f"{op}: impl {impl!r} cannot run this: {reason}")
            return candidate
    known = ", ".join(["auto", *(c.name for c in implementations)])
    raise ValueError(f"{op}: impl must be one of {known}; found {impl!r}")


def explain(op: str, implementations: Sequence[Implementation], call: Call) -> Choice:
    """What ``impl="auto"`` runs for ``call``, and why each other implementation is not chosen."""
    chosen = choose(op, implementations, "auto", call)
    others = {
        c.name: c.blocked(call) or c.passed_over(call) or f"{chosen.name} comes first"
        for c in implementations
        if c.name != chosen.name
    }
    return Choice(chosen.name, others)


def lazy(module: str, function: str) -> Callable:
    """``function`` of ``module``, imported when first called: Triton and FlexAttention are not needed to import us."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), function)(*args, **kwargs)

    return run


def any_of(*reasons: Reason) -> Reason:
    """The first reason that applies."""

    def first(call: Call) -> str | None:
        return next((text for reason in reasons if (text := reason(call)) is not None), None)

    return first


# Reasons that several implementations share


def interpreting() -> bool:
    """Whether Triton runs under its interpreter (``TRITON_INTERPRET=1``): on any device, slowly, for tests."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def needs_triton(call: Call) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if call.device.type != "cuda" and not interpreting():
        return f"triton needs a CUDA device, or TRITON_INTERPRET=1; found {call.device.type}"
    if call.dtype == torch.float64 and not interpreting():
        return "fp64 runs in the reference (or in triton under TRITON_INTERPRET=1)"
    if call.dtype == torch.bfloat16 and interpreting():
        return "triton's interpreter multiplies the bits of bf16; use fp32"
    if max(call.dim, call.value_dim) > 256:
        return f"head dims up to 256; found {max(call.dim, call.value_dim)}"
    return None


def only_for_tests(call: Call) -> str | None:
    """``passed_over`` of a Triton kernel: under the interpreter it runs, thousands of times slower."""
    return "under triton's interpreter a kernel is for tests only; name it to run it" if interpreting() else None


def needs_flex(call: Call) -> str | None:
    if call.device.type not in ("cpu", "cuda"):
        return f"FlexAttention is tried on CUDA and on CPUs only; found {call.device.type}"
    if call.device.type == "cpu" and call.grad:
        return "FlexAttention has no backward on a CPU"
    if call.device.type == "cuda" and min(call.dim, call.value_dim) < 16:
        return f"FlexAttention needs head dims of 16 or more on CUDA; found {min(call.dim, call.value_dim)}"
    if call.device.type == "cuda" and call.dtype == torch.float64:
        return "FlexAttention on CUDA has no fp64"
    return None


def slow_on_cpu(call: Call) -> str | None:
    """``passed_over`` of a FlexAttention version: uncompiled on a CPU it builds the whole score matrix."""
    return "uncompiled on a CPU it builds the whole score matrix" if call.device.type == "cpu" else None
