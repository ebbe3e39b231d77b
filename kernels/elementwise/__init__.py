"""Elementwise attention: weights that are a function of each score alone, without the softmax over a row.

    w = f(scale * q k^T + bias)        out = sum of w v, divided by 1 or by the number of keys the row sees

Sources: sigmoid with bias -log n, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (ICLR 2025);
exp without a denominator, "On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective" (2025),
whose code clamps scores at 5 and normalises outside. Both read in a description, not checked against their code.
"""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dispatch import Call, Choice, Implementation, any_of, lazy, needs_flex, slow_on_cpu
from vlm.kernels.elementwise.reference import Weighing, elementwise_reference, elementwise_torch
from vlm.kernels.visibility import Common, Operands, check, operands

NAME = "elementwise_attention"
FUNCTIONS = ("sigmoid", "exp", "relu")
NORMALIZERS = ("none", "count")


def _has_logarithm(call: Call) -> str | None:
    return "the log of relu is -inf with no gradient" if call.more.get("fn") == "relu" else None


_flex = lazy("vlm.kernels.elementwise.flex", "elementwise_flex")
IMPLEMENTATIONS = (
    Implementation("flex", _flex, any_of(needs_flex, _has_logarithm), slow_on_cpu),
    Implementation("torch", elementwise_torch),
    Implementation("reference", elementwise_reference),
)


def elementwise_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    fn: str = "sigmoid",
    bias: str | float | Float[Tensor, " heads"] | None = None,
    normalizer: str = "none",
    impl: str = "auto",
    **common: Unpack[Common],
) -> Float[Tensor, "batch heads rows value_dim"]:
    """Attention whose weights do not sum to one.

    Args:
        fn: ``"sigmoid"``, ``"exp"`` of at most 5, or ``"relu"``, of the scaled score plus the bias.
        bias: a number, one per head, or ``"-logn"``: minus the log of the number of keys of the row's own sample
            (later ones too; hidden ones and those of other documents not). By default ``"-logn"`` for sigmoid and 0
            for the others.
        normalizer: ``"none"``, or ``"count"`` to divide each row by the number of keys that it sees.
        **common: see :class:`~vlm.kernels.visibility.Common`.

    Returns:
        [batch, heads, rows, value_dim] in the type of the inputs; 0 in a row that sees no key.

    Raises:
        ValueError: shapes, types or devices that do not fit, an unknown ``fn``, ``bias`` or ``normalizer``, a bias
            that is not finite, or an ``impl`` that cannot run here.
    """
    x = operands(NAME, q, k, v, common)
    for name, value, known in (("fn", fn, FUNCTIONS), ("normalizer", normalizer, NORMALIZERS)):
        if value not in known:
            raise ValueError(f"{NAME}: {name} must be one of {', '.join(known)}; found {value!r}")
    if bias is None:
        bias = "-logn" if fn == "sigmoid" else 0.0
    how = Weighing(fn, _bias(x, bias, common.get("validate", True)), normalizer == "count")
    call = Call.of(q, k, v, how.bias, fn=fn)
    return dispatch.choose(NAME, IMPLEMENTATIONS, impl, call).run(x, how)


def explain(call: Call) -> Choice:
    """Which implementation ``impl="auto"`` takes for a call, and why not the others."""
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)


def _bias(x: Operands, bias: str | float | Tensor, look: bool) -> Float[Tensor, "batch heads rows"]:
    batch, heads, rows = x.q.shape[:3]
    if isinstance(bias, str):
        if bias != "-logn":
            raise ValueError(f"{NAME}: bias must be '-logn', a number or one per head; found {bias!r}")
        keys = x.seen.count(causal=False).clamp_min(1)  # [B or 1,Q]
        return -keys.to(x.accumulator).log()[:, None].expand(batch, heads, rows)
    if isinstance(bias, Tensor):
        check(NAME, "bias", bias, (heads,), x.q.device)
        if look and not bool(bias.isfinite().all()):
            raise ValueError(f"{NAME}: bias must be finite; found {bias[~bias.isfinite()][0].item()}")
        return bias.to(x.accumulator)[:, None].expand(batch, heads, rows)
    if not abs(float(bias)) < float("inf"):
        raise ValueError(f"{NAME}: bias must be finite; found {bias}")
    return torch.full((), float(bias), dtype=x.accumulator, device=x.q.device).expand(batch, heads, rows)
