"""Grouped-mass attention in one pass over keys and values: an online softmax that also sums by group.

A rule that depends on masses is not known until the last key. So groups that share a coefficient share a *slot*, each
slot has its own accumulator, and coefficients come in the epilogue. Coefficients that do not depend on masses
multiply the weights on the way and need one accumulator.

The online softmax is that of FlashAttention (Dao et al. 2022); the slots are ours.
"""

# Triton types compile-time values as constexpr and ranges as opaque; Python passes plain ones
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.grouped_mass.rules import LEAST_MASS, MassFloor, Neutral, Redistribution, Rule, Static
from vlm.kernels.grouped_mass.triton_common import (
    MORE_SLOTS,
    ONE_SLOT,
    Strides,
    add_by_group,
    at_head,
    group_of,
    map_scores,
    prepare,
    present_in,
    seen_pairs,
    sizes_for,
    value_settings,
    visible_keys,
    zero_by_group,
)
from vlm.kernels.tile import LN2, LOG2E, dot, key_codes, load_tile, on_device, row_codes, store_tile
from vlm.kernels.visibility import Operands

NEUTRAL: tl.constexpr = tl.constexpr(0)
STATIC: tl.constexpr = tl.constexpr(1)
RENORMALISED: tl.constexpr = tl.constexpr(2)
REDISTRIBUTION: tl.constexpr = tl.constexpr(3)
FLOOR: tl.constexpr = tl.constexpr(4)
LEAST: tl.constexpr = tl.constexpr(LEAST_MASS)


class Terms(NamedTuple):
    """What a kernel needs to know of a rule; sets of groups are bit masks.

    first, second: groups of slots 0 and 1 (what gets mass and what gives it); all others are in slot 2.
    """

    gains: Tensor | None = None  # [1 or heads, groups]
    gains_head: int = 0  # elements from one head to the next
    first: int = 0
    second: int = 0
    watched: int = 0
    needed: int = 0
    strength: float = 0.0  # Redistribution.taken, MassFloor.least
    limit: float = 0.0  # Redistribution.watched_min, MassFloor.most
    share: float = 0.0  # Redistribution.target_share


class ClosedForm(NamedTuple):
    """A rule as the kernels compute it."""

    kind: int
    slots: int
    terms: Terms

    @property
    def by_mass(self) -> bool:
        """Whether coefficients depend on the masses of their row."""
        return self.kind not in (NEUTRAL.value, STATIC.value)

    @property
    def per_head(self) -> bool:
        return self.terms.gains_head > 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"KIND": self.kind, "SLOTS": self.slots}


def closed_form(rule: Rule, heads: int, like: Tensor) -> ClosedForm | None:
    """How the kernels compute a rule, its tables of the type and device of ``like``; None for one they do not know.

    Gains that are being learned are not known either: their gradient is torch's matter.
    """
    if type(rule) is Neutral:
        return ClosedForm(NEUTRAL.value, 1, Terms())
    if type(rule) is Static:
        return _static(rule, heads, like)
    if type(rule) is Redistribution:
        return _redistribution(rule)
    if type(rule) is MassFloor:
        bit, every = 1 << rule.group, (1 << rule.groups) - 1
        terms = Terms(first=bit, second=every & ~bit, strength=float(rule.least), limit=float(rule.most))
        return ClosedForm(FLOOR.value, 2, terms)
    return None


def _static(rule: Static, heads: int, like: Tensor) -> ClosedForm | None:
    learned = rule.gains.requires_grad and torch.is_grad_enabled()
    gains = rule.gains.detach().to(like).reshape(-1, rule.groups).contiguous()
    if learned or len(gains) not in (1, heads):
        return None
    kind = RENORMALISED.value if rule.renormalise else STATIC.value
    return ClosedForm(kind, 1, Terms(gains=gains, gains_head=rule.groups if len(gains) > 1 else 0))


def _redistribution(rule: Redistribution) -> ClosedForm | None:
    sets = (rule.target, rule.source, rule.watched, rule.needed or rule.source)
    if any(len(set(groups)) < len(groups) for groups in sets):  # the definition counts a repeated group twice
        return None
    first, second, watched, needed = (sum(1 << group for group in groups) for groups in sets)
    slots = 2 if first | second == (1 << rule.groups) - 1 else 3
    numbers = (float(rule.taken), float(rule.watched_min), float(rule.target_share))
    return ClosedForm(REDISTRIBUTION.value, slots, Terms(None, 0, first, second, watched, needed, *numbers))


class Result(NamedTuple):
    """``out`` is None where there were no values."""

    out: Float[Tensor, "batch heads rows value_dim"] | None
    mass: Float[Tensor, "batch heads rows groups"]
    lse: Float[Tensor, "batch heads rows"]


def new_output(x: Operands) -> Float[Tensor, "batch heads rows value_dim"]:
    """Memory for an output. It lies as [batch, rows, heads, dim]: models merge heads next."""
    assert x.v is not None
    batch, heads, rows, _ = x.q.shape
    return torch.empty(batch, rows, heads, x.v.shape[3], dtype=x.v.dtype, device=x.v.device).transpose(1, 2)


def new_result(x: Operands, groups: int) -> Result:
    """Memory for results, not yet written."""
    options = {"dtype": x.accumulator, "device": x.q.device}
    shape = x.q.shape[:3]
    mass, lse = torch.empty(*shape, groups, **options), torch.empty(shape, **options)
    return Result(None if x.v is None else new_output(x), mass, lse)


def forward(x: Operands, grouping: Grouping, form: ClosedForm) -> Result:
    """Output, masses and log-sum-exp in one pass; without values masses and log-sum-exp only."""
    batch, heads, rows, _ = x.q.shape
    result = new_result(x, grouping.rule.groups)
    sizes = sizes_for(ONE_SLOT if form.slots == 1 else MORE_SLOTS, x)
    with on_device(x.q):
        launch = prepare(x, grouping, sizes)
        forward_kernel[(triton.cdiv(rows, sizes.rows) * batch * heads,)](
            x.q,
            x.k,
            x.v,
            *result,
            Strides.of(x.q),
            Strides.of(x.k),
            Strides.of(x.k if x.v is None else x.v),
            Strides.of(x.q if result.out is None else result.out),
            *launch.tables,
            form.terms,
            heads,
            rows,
            x.k.shape[2],
            x.scale * LOG2E.value,
            **value_settings(x.v),
            **form.settings,
            **launch.settings,
        )
    return result


@triton.jit(do_not_specialize=["rows", "keys"])
def forward_kernel(
    q,
    k,
    v,
    out,
    mass,
    lse,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    codes,
    groups,
    score_map,
    row_sel,
    kv_head_of,
    terms,
    heads,
    rows,
    keys,
    scale,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    KIND: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program makes ROWS rows of one head. Keys and values are read once."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    tile = row_tiles - 1 - pid % row_tiles  # rows that see most keys start first
    head, batch = (pid // row_tiles) % heads, pid // (row_tiles * heads)
    i = tile * ROWS + tl.arange(0, ROWS)
    row_position, row_document = row_codes(codes.row_position, codes.row_document, batch, i, rows, keys, BY_INDEX)
    selected = tl.load(row_sel + batch.to(tl.int64) * rows + i, mask=i < rows, other=0).to(ACC)
    q_tile = load_tile(at_head(q, q_strides, batch, head), i, q_strides.row, rows, DIM, WIDTH)

    kv_head = tl.load(kv_head_of + head)
    k_base, v_base = at_head(k, k_strides, batch, kv_head), at_head(v, v_strides, batch, kv_head)
    last_row = tl.minimum(tile * ROWS + ROWS, rows) - 1
    first, last = visible_keys(batch, last_row, row_position, row_document, codes, rows, keys, CAUSAL, BY_INDEX, KEYS)
    most, total, acc0, acc1, acc2 = nothing_yet(ROWS, GROUPS, VALUE_WIDTH, SLOTS, ACC)
    for key_tile in range(first, last):
        most, total, acc0, acc1, acc2 = absorb(
            q_tile, selected, row_position, row_document, key_tile,
            k_base, v_base, k_strides.row, v_strides.row, codes, groups, score_map, terms,
            batch, head, keys, scale,
            most, total, acc0, acc1, acc2,
            CAUSAL, BY_INDEX, KIND, SLOTS, GROUPS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, ACC,
        )  # fmt: skip
    finish(
        out, mass, lse, out_strides, batch, head, heads, i, rows, selected, terms,
        most, total, acc0, acc1, acc2, KIND, SLOTS, GROUPS, VALUE_DIM, VALUE_WIDTH, ACC,
    )  # fmt: skip


@triton.jit
def nothing_yet(
    ROWS: tl.constexpr, GROUPS: tl.constexpr, VALUE_WIDTH: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr
):
    """The state before the first key: greatest score, a sum for each group, an accumulator for each slot in use."""
    most = tl.full([ROWS], float("-inf"), ACC)
    total = zero_by_group(ROWS, GROUPS, ACC)
    acc0 = tl.zeros([ROWS, VALUE_WIDTH], ACC)
    acc1 = tl.zeros([ROWS, VALUE_WIDTH if SLOTS > 1 else 1], ACC)
    acc2 = tl.zeros([ROWS, VALUE_WIDTH if SLOTS > 2 else 1], ACC)
    return most, total, acc0, acc1, acc2


@triton.jit
def absorb(
    q_tile,
    selected,
    row_position,
    row_document,
    key_tile,
    k_base,
    v_base,
    k_row,
    v_row,
    codes,
    groups,
    score_map,
    terms,
    batch,
    head,
    keys,
    scale,
    most,
    total,
    acc0,
    acc1,
    acc2,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    KIND: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The state after one more key tile."""
    j = key_tile * KEYS + tl.arange(0, KEYS)
    group = group_of(groups, batch, head, j, keys)
    present = present_in(groups, batch, head, key_tile)
    k_tile = load_tile(k_base, j, k_row, keys, DIM, WIDTH)
    key_position, key_document = key_codes(codes.key_position, codes.key_document, batch, j, keys, BY_INDEX)

    x = dot(q_tile, tl.trans(k_tile), ACC) * scale
    x = map_scores(x, selected, group, score_map, batch, head, j, keys, 0, GROUPS, ACC)
    seen = seen_pairs(row_position, row_document, key_position, key_document, 0, CAUSAL)
    x = tl.where(seen, x, float("-inf"))

    new_most = tl.maximum(most, tl.max(x, 1))
    safe = tl.where(new_most == float("-inf"), 0.0, new_most)  # no visible key yet: -inf - -inf is not a number
    p = tl.exp2(x - safe[:, None])
    shrink = tl.exp2(most - safe)

    total = add_by_group(total, shrink, p, group, present, GROUPS)
    if v_base is not None:
        if (KIND == STATIC) | (KIND == RENORMALISED):
            gain = tl.load(terms.gains + head * terms.gains_head + group)
            p = tl.where(selected[:, None] > 0, p * gain[None, :], p)
        v_tile = load_tile(v_base, j, v_row, keys, VALUE_DIM, VALUE_WIDTH)
        acc0, acc1, acc2 = accumulate(p, shrink, v_tile, group, present, terms, acc0, acc1, acc2, SLOTS, ACC)
    return new_most, total, acc0, acc1, acc2


@triton.jit
def accumulate(p, shrink, v_tile, group, present, terms, acc0, acc1, acc2, SLOTS: tl.constexpr, ACC: tl.constexpr):
    """p v added to the slots of the groups that are present.

    One product stands outside every branch: only for such a one values are fetched ahead.
    """
    acc0 = acc0 * shrink[:, None]
    if SLOTS == 1:
        acc0 += dot(p.to(v_tile.dtype), v_tile, ACC)
    else:
        acc1 = acc1 * shrink[:, None]
        first, second = present & terms.first, present & terms.second
        rest = present & ~(terms.first | terms.second)
        main = tl.where(first != 0, first, tl.where(second != 0, second, rest))
        value = dot(within(p, main, group).to(v_tile.dtype), v_tile, ACC)
        if SLOTS == 3:
            acc2 = acc2 * shrink[:, None]
            if rest != 0:
                if main == rest:
                    acc2 += value
                else:
                    acc2 += dot(within(p, rest, group).to(v_tile.dtype), v_tile, ACC)
        if second != 0:
            if main == second:
                acc1 += value
            else:
                acc1 += dot(within(p, second, group).to(v_tile.dtype), v_tile, ACC)
        if first != 0:
            acc0 += value
    return acc0, acc1, acc2


@triton.jit
def within(p, mask, group):
    """p at the keys whose group is in a set, 0 at others."""
    return tl.where((((mask >> group) & 1) != 0)[None, :], p, 0.0)


@triton.jit
def finish(
    out,
    mass,
    lse,
    out_strides,
    batch,
    head,
    heads,
    i,
    rows,
    selected,
    terms,
    most,
    total,
    acc0,
    acc1,
    acc2,
    KIND: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Masses and log-sum-exp of rows that have seen all their keys; the rule; the output."""
    norm = total[0]
    for g in tl.static_range(1, GROUPS):
        norm += total[g]
    empty = norm == 0
    norm = tl.where(empty, 1.0, norm)
    line = (batch * heads + head).to(tl.int64) * rows + i
    tl.store(lse + line, tl.where(empty, float("-inf"), (most + tl.log2(norm)) * LN2), mask=i < rows)
    weighted = norm * 0
    for g in tl.static_range(GROUPS):
        tl.store(mass + line * GROUPS + g, total[g] / norm, mask=i < rows)
        if KIND == RENORMALISED:
            weighted += total[g] / norm * tl.load(terms.gains + head * terms.gains_head + g)
    if out is not None:
        first, second = coefficients(total, norm, selected, terms, KIND, GROUPS)
        if KIND == RENORMALISED:
            norm = norm * tl.where((selected > 0) & (weighted > 0), weighted, 1.0)
        value = acc0
        if SLOTS > 1:
            value = acc0 * first[:, None] + acc1 * second[:, None]
        if SLOTS > 2:
            value += acc2
        value = (value / norm[:, None]).to(out.dtype.element_ty)
        store_tile(at_head(out, out_strides, batch, head), i, out_strides.row, rows, VALUE_DIM, value, VALUE_WIDTH)


@triton.jit
def coefficients(total, norm, selected, terms, KIND: tl.constexpr, GROUPS: tl.constexpr):
    """Coefficients of slots 0 and 1 in each row, as the rules of :mod:`vlm.kernels.grouped_mass.rules` define them."""
    one = selected * 0 + 1
    first, second = one, one
    target = mass_of(terms.first, total, norm, GROUPS)
    if KIND == REDISTRIBUTION:
        source = mass_of(terms.second, total, norm, GROUPS)
        watched = mass_of(terms.watched, total, norm, GROUPS)
        acts = (watched >= terms.limit) & (target >= watched * terms.share) & (target > LEAST)
        acts = acts & (mass_of(terms.needed, total, norm, GROUPS) > 0) & (selected > 0)
        first = tl.where(acts, one + source * terms.strength / tl.maximum(target, LEAST), one)
        second = tl.where(acts, one - terms.strength, one)
    if KIND == FLOOR:
        acts = (target > LEAST) & (target < terms.strength) & (selected > 0)
        gain = tl.minimum(terms.strength / tl.maximum(target, LEAST), terms.limit)
        first = tl.where(acts, gain, one)
        second = tl.where(acts, (one - first * target) / (one - tl.where(acts, target, 0.0)), one)
    return first, second


@triton.jit
def mass_of(groups, total, norm, GROUPS: tl.constexpr):
    """The mass of a set of groups in each row."""
    mass = norm * 0
    for g in tl.static_range(GROUPS):
        if (groups >> g) & 1:
            mass += total[g] / norm
    return mass
