"""Received attention: how much attention each key gets from chosen rows, without an N x N matrix.

    r[j] = sum over the chosen rows i of  w[i] * softmax_j(scale * q[i] k^T)

What pruners score visual tokens by: the last row (FastV), all text rows, an observation window (SnapKV).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.received.reference import received_reference
from vlm.kernels.visibility import check_heads

IMPLEMENTATIONS = (dispatch.Implementation("reference", received_reference),)
REDUCTIONS = ("sum", "max", "sumsq")


def received_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    *,
    row_weight: Float[Tensor, "batch chosen"] | None = None,
    causal: bool = True,
    key_valid: Bool[Tensor, "batch keys"] | None = None,
    reduce: str = "sum",
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "batch heads keys"]:
    """How much attention each key receives from the chosen rows.

    Args:
        lse: natural log-sum-exp of every row, from the forward pass; ``None`` computes it for the chosen rows.
        rows: indices of the chosen rows; -1 marks an unused place.
        row_weight: weight of each chosen row, not negative; 1 by default.
        causal: row i sees key j iff j <= i + keys - rows.
        key_valid: False hides a key from every row (padding on either side).
        reduce: ``"sum"`` of w p, ``"max"`` of p, or ``"sumsq"``, the sum of w p^2, over the chosen rows.

    Returns:
        [batch, heads, keys] in fp32 or better. With ``"sum"`` it sums over keys to the sum of the row weights.

    Raises:
        ValueError: shapes that do not fit, a row out of range, an unknown ``reduce``, or an ``impl`` that
            cannot run here.
    """
    check_heads("received_attention", q, k, key_valid)
    if reduce not in REDUCTIONS:
        raise ValueError(f"received_attention: reduce must be one of {', '.join(REDUCTIONS)}; found {reduce!r}")
    if rows.numel() and not -1 <= int(rows.min()) <= int(rows.max()) < q.shape[2]:
        low, high = int(rows.min()), int(rows.max())
        raise ValueError(f"received_attention: rows must be -1..{q.shape[2] - 1}; found {low}..{high}")
    if row_weight is None:
        row_weight = torch.ones(rows.shape, dtype=torch.float32, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = dispatch.choose("received_attention", IMPLEMENTATIONS, impl, q.device)
    return chosen.run(q, k, lse, rows.long(), row_weight, causal, key_valid, reduce, scale)


def explain(device: torch.device) -> dispatch.Choice:
    """Which implementation would run on ``device`` and why the others would not."""
    return dispatch.explain("received_attention", IMPLEMENTATIONS, device)
