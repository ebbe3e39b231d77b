"""Grouped-mass attention: attention that knows how much each group of keys got, and may reweigh the groups.

    p = softmax(scale * q k^T)         M[g] = sum of p over the keys of group g
    out = sum over g of  C[g] * (sum over the keys of group g of p v),      C = rule(M)

Every mitigation method that acts on attention weights is a rule over group masses.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.grouped_mass.reference import grouped_mass_reference
from vlm.kernels.grouped_mass.rules import Neutral, Rule
from vlm.kernels.visibility import check_heads

IMPLEMENTATIONS = (dispatch.Implementation("reference", grouped_mass_reference),)


def grouped_mass_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    group_ids: Int[Tensor, "batch keys"],
    *,
    rule: Rule | str = "neutral",
    row_sel: Bool[Tensor, "batch rows"] | None = None,
    causal: bool = True,
    key_valid: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Attention with its keys in groups.

    Args:
        group_ids: group of each key, 0 <= g < rule.groups.
        rule: a :class:`~vlm.kernels.grouped_mass.rules.Rule`, or ``"neutral"``.
        row_sel: rows where the rule may act; all rows by default.
        causal: row i sees key j iff j <= i + keys - rows.
        key_valid: False hides a key from every row (padding on either side).
        scale: of the scores; dim ** -0.5 by default.

    Returns:
        out [batch, heads, rows, value_dim]; masses [batch, heads, rows, groups] in fp32 or better, summing to
        1 in every row that sees a key; with ``return_lse`` also the natural log-sum-exp [batch, heads, rows].
        A row that sees no key gives out 0, masses 0 and -inf.

    Raises:
        ValueError: shapes that do not fit, a group id out of range, or an ``impl`` that cannot run here.
    """
    rule = Neutral() if isinstance(rule, str) and rule == "neutral" else rule
    if isinstance(rule, str):
        raise ValueError(f"grouped_mass_attention: rule must be 'neutral' or a Rule; found {rule!r}")
    check_heads("grouped_mass_attention", q, k, key_valid)
    if tuple(group_ids.shape) != (k.shape[0], k.shape[2]):
        expected, found = (k.shape[0], k.shape[2]), tuple(group_ids.shape)
        raise ValueError(f"grouped_mass_attention: group_ids must be [batch, keys] = {expected}; found {found}")
    if group_ids.numel() and not 0 <= int(group_ids.min()) <= int(group_ids.max()) < rule.groups:
        low, high = int(group_ids.min()), int(group_ids.max())
        raise ValueError(f"grouped_mass_attention: group ids must be 0..{rule.groups - 1}; found {low}..{high}")
    if row_sel is None:
        row_sel = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = dispatch.choose("grouped_mass_attention", IMPLEMENTATIONS, impl, q.device)
    out, mass, lse = chosen.run(q, k, v, group_ids.long(), rule, row_sel, causal, key_valid, scale)
    return (out, mass, lse) if return_lse else (out, mass)


def explain(device: torch.device) -> dispatch.Choice:
    """Which implementation would run on ``device`` and why the others would not."""
    return dispatch.explain("grouped_mass_attention", IMPLEMENTATIONS, device)
