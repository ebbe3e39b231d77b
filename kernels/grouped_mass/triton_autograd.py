"""Grouped-mass attention in Triton: which kernels run, and how gradients flow.

A rule that the kernels know runs in one pass over the keys, or split over them for a few rows; any other rule
between two passes. Gradients are those of :mod:`vlm.kernels.grouped_mass.triton_backward` in each case; the derivative
of a rule by its masses is left to torch, so that a rule is written once.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.grouped_mass.rules import Neutral
from vlm.kernels.grouped_mass.triton_backward import (
    Columns,
    Upstream,
    column_gradients,
    row_dots,
    row_gradients,
)
from vlm.kernels.grouped_mass.triton_decode import MOST_ROWS, decode
from vlm.kernels.grouped_mass.triton_forward import NEUTRAL, ClosedForm, closed_form, forward
from vlm.kernels.grouped_mass.two_pass import second_pass
from vlm.kernels.tile import unit_stride
from vlm.kernels.visibility import Operands, Visibility


def grouped_mass_triton(x: Operands, grouping: Grouping) -> tuple[Tensor, Tensor, Tensor]:
    """(out, masses, log-sum-exp) as the reference defines them."""
    assert x.v is not None
    x = replace(x, q=unit_stride(x.q), k=unit_stride(x.k), v=unit_stride(x.v))
    table = torch.empty(0, dtype=x.accumulator, device=x.q.device)
    form = closed_form(grouping.rule, x.q.shape[1], table)
    if form is not None:
        return _run(x, grouping, form)
    neutral = closed_form(Neutral(grouping.rule.groups), x.q.shape[1], table)
    _, mass, lse = _run(replace(x, v=None), grouping, neutral)
    coefficient = grouping.coefficient(mass).to(mass).expand_as(mass).contiguous()
    out, _, _ = _run(x, grouping, None, coefficient, lse.detach())
    return out, mass, lse


class Work(NamedTuple):
    """What a call does, without the tensors that gradients flow to.

    form: the rule in closed form; None in the second pass of any other rule, which gets coefficients instead.
    lse: in the second pass that of the first.
    """

    scale: float
    seen: Visibility
    kv_head_of: Tensor | None
    grouping: Grouping
    form: ClosedForm | None
    lse: Tensor | None


def _run(
    x: Operands,
    grouping: Grouping,
    form: ClosedForm | None,
    coefficient: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Any, Any, Any]:
    inputs = (x.q, x.k, x.v, coefficient, grouping.gamma, grouping.beta, grouping.key_bias)
    work = Work(x.scale, x.seen, x.kv_head_of, grouping._replace(gamma=None, beta=None, key_bias=None), form, lse)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return GroupedMass.apply(*inputs, work)
    if form is not None and x.v is not None and 0 < x.q.shape[2] <= MOST_ROWS:
        return decode(x, grouping, form)
    return _forward(work, *inputs)


def _operands(work: Work, q: Tensor, k: Tensor, v: Tensor | None) -> Operands:
    return Operands(q, k, v, work.scale, work.seen, work.kv_head_of)


def _forward(
    work: Work,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    coefficient: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, grouping = _operands(work, q, k, v), work.grouping._replace(gamma=gamma, beta=beta, key_bias=key_bias)
    if work.form is not None:
        return forward(x, grouping, work.form)
    assert coefficient is not None and work.lse is not None
    return second_pass(x, grouping, work.lse, coefficient), None, None


class GroupedMass(torch.autograd.Function):
    """One launch of a forward, and its gradients. Results that it does not make are None."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        *inputs, work = arguments
        out, mass, lse = _forward(work, *inputs)
        ctx.work = work
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, mass, work.lse if lse is None else lse)
        return out, mass, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable hides the names)
        ctx: Any, d_out: Tensor | None, d_mass: Tensor | None, d_lse: Tensor | None
    ) -> tuple[Any, ...]:
        q, k, v, coefficient, gamma, beta, key_bias, out, mass, lse = ctx.saved_tensors
        if d_out is None and d_mass is None and d_lse is None:
            return (None,) * 8
        x = _operands(ctx.work, q, k, v)
        grouping = ctx.work.grouping._replace(gamma=gamma, beta=beta, key_bias=key_bias)
        d_out = None if d_out is None else unit_stride(d_out)
        if d_out is not None and coefficient is None:
            coefficient, d_mass = _rule_gradient(x, grouping, ctx.work.form, d_out, mass, lse, d_mass)
        extra = _extra(out, mass, d_out, d_mass, d_lse)
        up = Upstream(d_out, lse, None if d_out is None else coefficient, extra)

        needs = ctx.needs_input_grad
        d_coefficient, dq = row_gradients(x, grouping, up, dots=needs[3], dq=needs[0])
        columns = column_gradients(x, grouping, up, sums=needs[5] or needs[6], absolute_sums=needs[4])
        return dq, columns.dk, columns.dv, d_coefficient, *_map_gradients(grouping, columns, needs[4:7]), None


def _rule_gradient(
    x: Operands,
    grouping: Grouping,
    form: ClosedForm,
    d_out: Tensor,
    mass: Tensor,
    lse: Tensor,
    d_mass: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(coefficients, the gradient of masses with what the rule adds to it)."""
    if form.kind == NEUTRAL.value:
        return None, d_mass
    if not form.by_mass or grouping.stop_rule:
        return grouping.rule(mass, grouping.row_sel).contiguous(), d_mass
    up = Upstream(d_out, lse, None, None)
    dots, _ = row_gradients(x, grouping, up, dots=True, dq=False)
    with torch.enable_grad():
        leaf = mass.detach().requires_grad_()
        coefficient = grouping.rule(leaf, grouping.row_sel)
        if coefficient.requires_grad:
            (by_rule,) = torch.autograd.grad(coefficient, leaf, dots)
            d_mass = by_rule if d_mass is None else d_mass + by_rule
    return coefficient.detach().contiguous(), d_mass


def _extra(
    out: Tensor | None, mass: Tensor | None, d_out: Tensor | None, d_mass: Tensor | None, d_lse: Tensor | None
) -> Float[Tensor, "batch heads rows *groups"]:
    """The table E of :mod:`vlm.kernels.grouped_mass.triton_backward`, without groups where they are all the same."""
    parts = [] if d_lse is None else [d_lse]
    if d_out is not None and out is not None:
        parts.append(-row_dots(d_out, out))
    if d_mass is not None and mass is not None:
        parts.append(-(d_mass * mass).sum(-1))
    extra = sum(parts[1:], parts[0])
    return (extra if d_mass is None else d_mass + extra[..., None]).contiguous()


def _map_gradients(grouping: Grouping, columns: Columns, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of gamma, beta and key_bias from sums over the rows of each key."""
    members = torch.nn.functional.one_hot(grouping.group_ids.long(), grouping.rule.groups)  # [B,1 or H,K,G]
    gradients: list[Tensor | None] = []
    pairs = ((grouping.gamma, columns.absolute_sums), (grouping.beta, columns.sums))
    for (table, sums), needed in zip(pairs, needs, strict=False):
        by_group = None
        if needed and table is not None and sums is not None:
            by_group = (sums[..., None] * members).sum((0, 2)).to(table.dtype)  # [H,G]
        gradients.append(by_group)
    bias, of_bias = grouping.key_bias, columns.sums
    if needs[2] and bias is not None and of_bias is not None:
        of_bias = of_bias.sum(1, keepdim=True) if bias.shape[1] == 1 else of_bias
        return [*gradients, of_bias.to(bias.dtype)]
    return [*gradients, None]
