"""Received attention as two FlexAttention calls: keys take the place of queries, and the log-sum-exp is the answer.

    r[j] = exp(logsumexp over the chosen rows i of  s[i, j] - lse[i] + log w[i])

Our first source of the idea is awslabs/keys_values. Checked on a CPU; nothing of it has run on a GPU, gradients
included (there autograd goes through the captured log-sum-exp).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from vlm.kernels.flex import block_mask, flex
from vlm.kernels.received.reference import received_reference
from vlm.kernels.visibility import Operands

SMALLEST_VALUE = 16  # value dim that FlexAttention takes on CUDA; nobody reads the values


def received_flex(
    x: Operands,
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    reduce: str,
) -> Float[Tensor, "batch heads keys"]:
    if not rows.shape[1] or not x.k.shape[2]:
        return received_reference(x, lse, rows, row_weight, reduce)  # FlexAttention takes no empty side
    batch, heads, _, dim = x.q.shape
    at = rows.clamp_min(0)
    q = x.q.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim))  # [B,H,R,D]
    k = x.per_head(x.k)  # [B,H,K,D]
    seen = x.seen.pick(rows)
    sees = seen.mask_mod(batch)
    if lse is None:
        mask = block_mask(sees, batch, seen)
        norm = flex(q, k, k.new_zeros(*k.shape[:3], SMALLEST_VALUE), block_mask=mask, scale=x.scale)[1]
    else:
        norm = lse.to(x.accumulator).gather(2, at[:, None].expand(-1, heads, -1))
    norm = norm.masked_fill(norm == float("-inf"), float("inf"))  # [B,H,R]; a row that sees nothing gives nothing
    log_weight = row_weight.log()  # [B,R]
    power = 2 if reduce == "sumsq" else 1

    def seen_by(b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
        return sees(b, h, i, j)

    def weighed(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
        return power * (score - norm[b, h, i]) + log_weight[b, i]

    on_gpu = x.q.is_cuda
    mask = create_block_mask(seen_by, batch, None, seen.keys, seen.rows, device=x.q.device, _compile=on_gpu)
    value = q.new_zeros(*q.shape[:3], SMALLEST_VALUE)
    return torch.exp(flex(k, q, value, score_mod=weighed, block_mask=mask, scale=x.scale)[1])
