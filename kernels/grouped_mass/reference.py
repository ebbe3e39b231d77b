"""The definition of grouped-mass attention in plain PyTorch: any float type, any device, differentiable."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import Rule
from vlm.kernels.visibility import repeat_kv, visible


def grouped_mass_reference(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    group_ids: Int[Tensor, "batch keys"],
    rule: Rule,
    row_sel: Bool[Tensor, "batch rows"],
    causal: bool,
    key_valid: Bool[Tensor, "batch keys"] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ repeat_kv(k, q.shape[1]).transpose(-1, -2)).to(accumulator) * scale  # [B,H,Q,K]
    seen = visible(q.shape[2], k.shape[2], causal, key_valid, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)  # [B,H,Q], -inf for a row that sees nothing
    safe = torch.where(lse.isinf(), torch.zeros_like(lse), lse)
    weights = torch.exp(scores - safe[..., None])  # [B,H,Q,K]

    membership = torch.nn.functional.one_hot(group_ids, rule.groups).to(accumulator)  # [B,K,G]
    mass = torch.einsum("bhqk,bkg->bhqg", weights, membership)
    coefficient = rule(mass, row_sel)
    weights = weights * torch.einsum("bhqg,bkg->bhqk", coefficient, membership)
    out = weights.to(v.dtype) @ repeat_kv(v, q.shape[1])
    return out, mass, lse
