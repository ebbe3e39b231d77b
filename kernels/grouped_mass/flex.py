"""Grouped-mass attention by FlexAttention: one call for each group that has a key, then the shares of the groups."""

import torch
from torch import Tensor

from vlm.kernels.flex import Modifier, flex, grouped_heads, mask_of
from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.state import shares
from vlm.kernels.visibility import Operands


def grouped_mass_flex(x: Operands, grouping: Grouping) -> tuple[Tensor, Tensor, Tensor]:
    """Which groups have a key is looked up first, which waits for the GPU. No backward on a CPU."""
    assert x.v is not None
    (batch, heads, rows), groups = x.q.shape[:3], grouping.rule.groups
    k, v = grouped_heads(x)
    outs: dict[int, Tensor] = {}
    lses = [x.q.new_full((batch, heads, rows), float("-inf"), dtype=x.accumulator)] * groups
    for group in grouping.group_ids.unique().tolist():
        mask = mask_of(x.seen, batch, grouping.group_ids == group)
        outs[group], lses[group] = flex(x.q, k, v, score_mod=_map(x, grouping, group), block_mask=mask, scale=x.scale)

    share, lse = shares(torch.stack(lses))  # [G,B,H,Q], [B,H,Q]
    mass = share.movedim(0, -1)  # [B,H,Q,G]
    weight = grouping.coefficient(mass) * mass
    out = weight.new_zeros(batch, heads, rows, v.shape[3])
    for group, of_group in outs.items():
        out = out + weight[..., group, None] * of_group.to(weight.dtype)
    return out.to(v.dtype), mass, lse


def _map(x: Operands, grouping: Grouping, group: int) -> Modifier | None:
    """The map of the scores of one group, in selected rows."""
    if not grouping.maps_scores:
        return None
    acts, bias = grouping.row_sel, grouping.key_bias
    (batch, heads), keys = x.q.shape[:2], x.k.shape[2]
    none = torch.zeros((), dtype=x.accumulator, device=x.q.device)
    slope = none.expand(heads) if grouping.gamma is None else grouping.gamma[:, group]
    offset = none.expand(heads) if grouping.beta is None else grouping.beta[:, group]
    bias = none.expand(batch, heads, keys) if bias is None else bias.expand(batch, heads, keys)
    return lambda s, b, h, i, j: torch.where(acts[b, i], s + slope[h] * s.abs() + offset[h] + bias[b, h, j], s)
