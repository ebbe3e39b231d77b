"""Grouped-mass attention: attention that knows how much each group of keys got, and may reweigh the groups.

    p = softmax(s')                    s' = scale * q k^T, in selected rows + gamma[g] |s| + beta[g] + key_bias
    M[g] = sum of p over the keys of group g
    out = sum over g of  C[g] * (sum over the keys of group g of p v),      C = rule(M)

Every mitigation method that acts on attention weights is a rule over group masses or a map of scores by group.
"""

from typing import Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dispatch import Implementation
from vlm.kernels.grouped_mass.reference import Grouping, grouped_mass_reference, grouped_mass_torch
from vlm.kernels.grouped_mass.rules import MOST_GROUPS, Neutral, Rule
from vlm.kernels.visibility import Common, check, operands

NAME = "grouped_mass_attention"
IMPLEMENTATIONS = (
    Implementation("torch", grouped_mass_torch),
    Implementation("reference", grouped_mass_reference),
)


def grouped_mass_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    group_ids: Int[Tensor, "batch keys"] | Int[Tensor, "batch heads keys"],
    *,
    rule: Rule | str = "neutral",
    row_sel: Bool[Tensor, "batch rows"] | None = None,
    gamma: Float[Tensor, "heads groups"] | None = None,
    beta: Float[Tensor, "heads groups"] | None = None,
    key_bias: Float[Tensor, "batch one_or_heads keys"] | None = None,
    rule_grad: str = "full",
    return_lse: bool = False,
    impl: str = "auto",
    **common: Unpack[Common],
) -> tuple[Tensor, ...]:
    """Attention with its keys in groups.

    Args:
        group_ids: group of each key, 0 <= g < rule.groups; with a head dimension where groups differ by head (ACT).
        rule: from masses to coefficients, see :mod:`vlm.kernels.grouped_mass.rules`; ``"neutral"`` has 4 groups.
        row_sel: rows where the rule and the map of scores act; all rows by default.
        gamma, beta: in selected rows the score s of a key of group g becomes s + gamma[g] |s| + beta[g] (PAI: gamma
            of the image in the last row).
        key_bias: in selected rows added to the scores of each key.
        rule_grad: ``"full"``, or ``"stop"`` to take coefficients as constants in the backward.
        **common: see :class:`~vlm.kernels.visibility.Common`.

    Returns:
        out [batch, heads, rows, value_dim]; masses [batch, heads, rows, groups] in fp32 (fp64 for fp64 inputs),
        summing to 1 in every row that sees a key; with ``return_lse`` also the natural log-sum-exp of s'
        [batch, heads, rows]. A row that sees no key gives out 0, masses 0 and -inf.

    Raises:
        ValueError: shapes, types or devices that do not fit, a group id out of range, a gamma, beta or key_bias
            that is not finite, or an ``impl`` that cannot run here.
    """
    if isinstance(rule, str):
        if rule != "neutral":
            raise ValueError(f"{NAME}: rule must be 'neutral' or a Rule; found {rule!r}")
        rule = Neutral()
    if not 1 <= rule.groups <= MOST_GROUPS:
        raise ValueError(f"{NAME}: a rule has 1..{MOST_GROUPS} groups; found {rule.groups}")
    if rule_grad not in ("full", "stop"):
        raise ValueError(f"{NAME}: rule_grad must be 'full' or 'stop'; found {rule_grad!r}")
    x = operands(NAME, q, k, v, common)
    look = common.get("validate", True)
    batch, heads, rows, keys = *q.shape[:3], k.shape[2]
    of_each = (batch, heads, keys) if group_ids.ndim == 3 else (batch, keys)
    check(NAME, "group_ids", group_ids, of_each, q.device, *((0, rule.groups - 1) if look else ()))
    if row_sel is None:
        row_sel = torch.ones(batch, rows, dtype=torch.bool, device=q.device)
    check(NAME, "row_sel", row_sel, (batch, rows), q.device)
    for name, table in (("gamma", gamma), ("beta", beta)):
        if table is not None:
            check(NAME, name, table, (heads, rule.groups), q.device)
            _finite(name, table, look)
    if key_bias is not None:
        check(NAME, "key_bias", key_bias, (batch, 1 if key_bias.shape[1] == 1 else heads, keys), q.device)
        _finite("key_bias", key_bias, look)
    groups = group_ids if group_ids.ndim == 3 else group_ids[:, None]
    grouping = Grouping(groups, rule, row_sel, gamma, beta, key_bias, rule_grad == "stop")
    call = dispatch.Call.of(q, k, v, gamma, beta, key_bias, grouping=grouping, kv_head_of=x.kv_head_of)
    out, mass, lse = dispatch.choose(NAME, IMPLEMENTATIONS, impl, call).run(x, grouping)
    return (out, mass, lse) if return_lse else (out, mass)


def _finite(name: str, x: Tensor, look: bool) -> None:
    if look and not bool(x.isfinite().all()):
        raise ValueError(f"{NAME}: {name} must be finite; found {x[~x.isfinite()][0].item()}")
