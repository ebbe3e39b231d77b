"""The definition of received attention in plain PyTorch: any float type, any device, differentiable."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels.visibility import Operands


def received_reference(
    x: Operands,
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    reduce: str,
) -> Float[Tensor, "batch heads keys"]:
    heads = x.q.shape[1]
    at = rows.clamp_min(0)  # [B,R]; the visibility of a row of -1 hides every key
    q = x.q.gather(2, at[:, None, :, None].expand(-1, heads, -1, x.q.shape[3]))  # [B,H,R,D]
    scores = replace(x, q=q, seen=x.seen.pick(rows)).scores()  # [B,H,R,K]
    norm = scores.logsumexp(-1) if lse is None else lse.to(scores.dtype).gather(2, at[:, None].expand(-1, heads, -1))
    norm = torch.where(norm.isinf(), torch.zeros_like(norm), norm)  # a row that sees nothing gives nothing
    attention = torch.exp(scores - norm[..., None])  # [B,H,R,K]
    weight = row_weight.to(scores.dtype)[:, None, :, None]  # [B,1,R,1]
    if reduce == "max":
        return (attention * (weight > 0)).amax(2) if rows.shape[1] else attention.sum(2)
    return ((attention if reduce == "sum" else attention**2) * weight).sum(2)
