"""Received attention: how much attention each key gets from chosen rows, without an N x N matrix.

    r[j] = sum over the chosen rows i of  w[i] * softmax_j(scale * q[i] k^T)

What pruners score visual tokens by: the last row (FastV), all text rows, an observation window (SnapKV).
The sum as such is known (FlagAttention's total attention, PaddlePaddle's reduced attention scores); here with a subset
of the rows, weights, GQA, padding, maximum and sum of squares, and a backward.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dense import dense_attention
from vlm.kernels.dispatch import Implementation, lazy
from vlm.kernels.received.reference import chosen_attention, received_reference, received_torch
from vlm.kernels.visibility import Common, check, operands

NAME = "received_attention"
REDUCTIONS = ("sum", "max", "sumsq")


def _no_maximum(call: dispatch.Call) -> str | None:
    if call.more.get("reduce") == "max":
        return "FlexAttention gives a maximum on CUDA only, and without a gradient"
    return None


IMPLEMENTATIONS = (
    Implementation(
        "triton",
        lazy("vlm.kernels.received.triton_backward", "received_triton"),
        dispatch.needs_triton,
        dispatch.only_for_tests,
    ),
    Implementation("torch", received_torch),
    Implementation(
        "flex",
        lazy("vlm.kernels.received.flex", "received_flex"),
        dispatch.any_of(dispatch.needs_flex, _no_maximum),
        dispatch.slow_on_cpu,
    ),
    Implementation("reference", received_reference),
)


def received_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    *,
    row_weight: Float[Tensor, "batch chosen"] | None = None,
    reduce: str = "sum",
    differentiable: bool = False,
    impl: str = "auto",
    **common: Unpack[Common],
) -> Float[Tensor, "batch heads keys"]:
    """How much attention each key receives from the chosen rows.

    Args:
        lse: natural log-sum-exp of every row, from the forward pass; ``None`` computes it for the chosen rows.
        rows: indices of the chosen rows; -1 marks an unused place. A row may be chosen more than once.
        row_weight: weight of each chosen row, not negative, a constant for gradients; 1 by default.
        reduce: ``"sum"`` of w p, ``"max"`` of p over rows of weight above 0, or ``"sumsq"``, the sum of w p^2.
        differentiable: whether gradients flow to q, k and lse; without, the result is detached. A given lse is an
            input of its own; its gradient reaches q and k by the way it was made. The gradient of a maximum goes
            to the first chosen row that attains it.
        **common: see :class:`~vlm.kernels.visibility.Common`.

    Returns:
        [batch, heads, keys] in fp32 (fp64 for fp64 inputs). With ``"sum"`` it sums over keys to the sum of the
        weights of the chosen rows that see a key.

    Raises:
        ValueError: shapes that do not fit, a row out of range, a weight below 0 or not finite, an unknown
            ``reduce``, or an ``impl`` that cannot run here.
    """
    x = operands(NAME, q, k, None, common)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduce must be one of {', '.join(REDUCTIONS)}; found {reduce!r}")
    look = common.get("validate", True)
    if rows.ndim != 2:
        raise ValueError(f"{NAME}: rows must be [batch, chosen]; found shape {tuple(rows.shape)}")
    check(NAME, "rows", rows, (q.shape[0], rows.shape[1]), q.device, -1, q.shape[2] - 1, look=look)
    if row_weight is None:
        row_weight = torch.ones(rows.shape, dtype=x.accumulator, device=q.device)
    check(NAME, "row_weight", row_weight, tuple(rows.shape), q.device)
    if look and not bool((row_weight.isfinite() & (row_weight >= 0)).all()):
        raise ValueError(f"{NAME}: row_weight must be finite and not negative; found {row_weight.min().item()}")
    if lse is not None:
        check(NAME, "lse", lse, tuple(q.shape[:3]), q.device)
    if not q.shape[2]:
        rows, row_weight = rows[:, :0], row_weight[:, :0]  # every place is unused
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        chosen = dispatch.choose(NAME, IMPLEMENTATIONS, impl, dispatch.Call.of(q, k, None, lse, reduce=reduce))
        return chosen.run(x, lse, rows.long(), row_weight.detach().to(x.accumulator), reduce)


def attention_rows(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    rows: Int[Tensor, "batch chosen"],
    **common: Unpack[Common],
) -> Float[Tensor, "batch heads chosen keys"]:
    """The attention of a few chosen rows (-1: unused), for statistics that no sum over rows gives: chosen x keys of
    memory, detached. Arguments and type of the result as of :func:`received_attention`, in plain PyTorch everywhere.

    Raises:
        ValueError: shapes that do not fit, or a row out of range.
    """
    x = operands("attention_rows", q, k, None, common)
    shape = (q.shape[0], rows.shape[-1])
    check("attention_rows", "rows", rows, shape, q.device, -1, q.shape[2] - 1, look=common.get("validate", True))
    with torch.no_grad():
        return chosen_attention(x, rows.long())


def attention_with_received(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    rows: Int[Tensor, "batch chosen"],
    *,
    row_weight: Float[Tensor, "batch chosen"] | None = None,
    reduce: str = "sum",
    differentiable: bool = False,
    impl: str = "auto",
    **common: Unpack[Common],
) -> tuple[Float[Tensor, "batch heads rows value_dim"], Float[Tensor, "batch heads keys"]]:
    """Dense attention and what each key receives from the chosen rows, with the log-sum-exp computed once.

    Arguments as of :func:`received_attention`; ``impl`` is that of the column pass. Returns (out, received).
    """
    out, lse = dense_attention(q, k, v, return_lse=True, **common)
    received = received_attention(
        q,
        k,
        lse,
        rows,
        row_weight=row_weight,
        reduce=reduce,
        differentiable=differentiable,
        impl=impl,
        **common,
    )
    return out, received


def explain(call: dispatch.Call) -> dispatch.Choice:
    """What ``impl="auto"`` runs for ``call`` (``more["reduce"]`` is the reduction), and why the others do not."""
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)
