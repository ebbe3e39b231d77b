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
from vlm.kernels.dispatch import (
    Call,
    Choice,
    Implementation,
    lazy,
    needs_flex,
    needs_triton,
    only_for_tests,
    slow_on_cpu,
)
from vlm.kernels.grouped_mass.reference import Grouping, grouped_mass_reference, grouped_mass_torch
from vlm.kernels.grouped_mass.rules import MOST_GROUPS, Neutral, Rule
from vlm.kernels.visibility import Common, Operands, check, operands

NAME = "grouped_mass_attention"
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        lazy("vlm.kernels.grouped_mass.triton_autograd", "grouped_mass_triton"),
        needs_triton,
        only_for_tests,
    ),
    Implementation("flex", lazy("vlm.kernels.grouped_mass.flex", "grouped_mass_flex"), needs_flex, slow_on_cpu),
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
    x = operands(NAME, q, k, v, common)
    look = common.get("validate", True)
    grouping = _grouping(x, group_ids, rule, row_sel, (gamma, beta, key_bias), rule_grad, look)
    grouping = grouping._replace(lse=return_lse)
    call = Call.of(q, k, v, gamma, beta, key_bias, grouping=grouping, kv_head_of=x.kv_head_of)
    out, mass, lse = dispatch.choose(NAME, IMPLEMENTATIONS, impl, call).run(x, grouping)
    return (out, mass, lse) if return_lse else (out, mass)


def explain(call: Call) -> Choice:
    """Which implementation ``impl="auto"`` takes for a call, and why not the others."""
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)


def _grouping(
    x: Operands,
    group_ids: Tensor,
    rule: Rule | str,
    row_sel: Tensor | None,
    maps: tuple[Tensor | None, Tensor | None, Tensor | None],
    rule_grad: str,
    look: bool,
) -> Grouping:
    """The checked arguments that plain attention does not have."""
    rule = _rule(rule)
    if rule_grad not in ("full", "stop"):
        raise ValueError(f"{NAME}: rule_grad must be 'full' or 'stop'; found {rule_grad!r}")
    (batch, heads, rows), keys, device = x.q.shape[:3], x.k.shape[2], x.q.device
    of_each = (batch, heads, keys) if group_ids.ndim == 3 else (batch, keys)
    check(NAME, "group_ids", group_ids, of_each, device, 0, rule.groups - 1, look=look)
    if row_sel is None:
        row_sel = torch.ones(batch, rows, dtype=torch.bool, device=device)
    check(NAME, "row_sel", row_sel, (batch, rows), device)
    if row_sel.dtype != torch.bool:
        raise ValueError(f"{NAME}: row_sel must be bool; found {row_sel.dtype}")
    gamma, beta, key_bias = maps
    of_groups = (heads, rule.groups)
    of_keys = (batch, 1 if key_bias is not None and key_bias.shape[1:2] == (1,) else heads, keys)
    for name, table, shape in (("gamma", gamma, of_groups), ("beta", beta, of_groups), ("key_bias", key_bias, of_keys)):
        if table is not None:
            check(NAME, name, table, shape, device)
            if look and not bool(table.isfinite().all()):
                raise ValueError(f"{NAME}: {name} must be finite; found {table[~table.isfinite()][0].item()}")
    groups = group_ids if group_ids.ndim == 3 else group_ids[:, None]
    return Grouping(groups, rule, row_sel, gamma, beta, key_bias, rule_grad == "stop")


def _rule(rule: Rule | str) -> Rule:
    if isinstance(rule, str):
        if rule != "neutral":
            raise ValueError(f"{NAME}: rule must be 'neutral' or a Rule; found {rule!r}")
        return Neutral()
    if not 1 <= rule.groups <= MOST_GROUPS:
        raise ValueError(f"{NAME}: a rule has 1..{MOST_GROUPS} groups; found {rule.groups}")
    return rule
