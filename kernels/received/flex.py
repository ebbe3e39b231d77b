"""Received attention as FlexAttention calls: keys take the place of rows, and the log-sum-exp is the answer.

    r[j] = exp(logsumexp over the chosen rows i of  s[i, j] - lse[i] + log w[i])

The idea is that of awslabs/keys_values. Checked on a CPU only, forward; on CUDA the gradients, which pass through the
captured lse, have not been seen.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels.flex import flex, mask_of
from vlm.kernels.visibility import Operands, Visibility

SMALLEST_VALUE = 16  # value dim that FlexAttention takes on CUDA; nobody reads the values


def received_flex(
    x: Operands,
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    reduce: str,
) -> Float[Tensor, "batch heads keys"]:
    batch, heads, _, dim = x.q.shape
    at = rows.clamp_min(0)
    q = x.q.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim))  # [B,H,R,D]
    k = x.per_head(x.k)  # [B,H,K,D]
    seen = x.seen.pick(rows)
    if lse is None:
        value = k.new_zeros(*k.shape[:3], SMALLEST_VALUE)
        norm = flex(q, k, value, block_mask=mask_of(seen, batch), scale=x.scale)[1]
    else:
        norm = lse.to(x.accumulator).gather(2, at[:, None].expand(-1, heads, -1))
    norm = norm.masked_fill(norm == float("-inf"), float("inf"))  # [B,H,R]; a row that sees nothing gives nothing
    log_weight = row_weight.log()  # [B,R]
    power = 2 if reduce == "sumsq" else 1
    value = q.new_zeros(*q.shape[:3], SMALLEST_VALUE)
    received = flex(
        k,
        q,
        value,
        score_mod=lambda score, b, h, j, i: power * (score - norm[b, h, i]) + log_weight[b, i],
        block_mask=mask_of(_turned(seen), batch),
        scale=x.scale,
    )
    return torch.exp(received[1])


def _turned(seen: Visibility) -> Visibility:
    """Rows and keys change places: ``key <= row`` is ``-row <= -key``."""
    row_position, key_position = seen.positions()
    return Visibility(
        seen.keys,
        seen.rows,
        seen.causal,
        seen.device,
        seen.key_valid,
        seen.row_valid,
        -key_position,
        -row_position,
        seen.key_document,
        seen.row_document,
    )
