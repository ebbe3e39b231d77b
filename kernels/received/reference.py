"""The definition of received attention in plain PyTorch: any float type, any device, differentiable."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.visibility import repeat_kv


def received_reference(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    causal: bool,
    key_valid: Bool[Tensor, "batch keys"] | None,
    reduce: str,
    scale: float,
) -> Float[Tensor, "batch heads keys"]:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    picked = rows.clamp_min(0)  # [B,R]; -1 marks an unused place, which gets weight 0 below
    chosen = q.gather(2, picked[:, None, :, None].expand(-1, heads, -1, q.shape[3]))  # [B,H,R,D]
    scores = (chosen @ repeat_kv(k, heads).transpose(-1, -2)).to(accumulator) * scale  # [B,H,R,K]

    seen = torch.ones(*rows.shape, keys, dtype=torch.bool, device=q.device)  # [B,R,K]
    if causal:
        seen = torch.arange(keys, device=q.device) <= (picked + keys - length)[..., None]
    if key_valid is not None:
        seen = seen & key_valid[:, None, :]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))

    if lse is None:
        norm = scores.logsumexp(-1)  # [B,H,R]
    else:
        norm = lse.to(accumulator).gather(2, picked[:, None, :].expand(-1, heads, -1))
    norm = torch.where(norm.isinf(), torch.zeros_like(norm), norm)  # a row that sees nothing gives nothing
    weights = torch.exp(scores - norm[..., None])
    weight = torch.where(rows >= 0, row_weight.to(accumulator), 0)[:, None, :, None]  # [B,1,R,1]
    if reduce == "max":
        return (weights * (weight > 0)).amax(2)
    return ((weights if reduce == "sum" else weights**2) * weight).sum(2)
