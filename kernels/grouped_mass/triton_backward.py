"""Gradients of grouped-mass attention: a flash backward in which ``a - delta`` is ``C a + E``.

With p the softmax weights, a = dO v^T, C the coefficient of each row and group, dM all that flows into the masses
(from outside, and from the rule: dM[g] = sum over g' of T[g'] dC[g']/dM[g] with T[g] = sum over g of p a), dL what
flows into the log-sum-exp:

    delta = dO . O + sum over g of dM[g] M[g]          E[g] = dM[g] - delta + dL
    ds' = p (C a + E)                                  ds = ds' (1 + gamma sign(s)) in selected rows
    dq = scale ds k      dk = scale ds^T q      dv = (C p)^T dO

The rows' kernel makes T and dq, the keys' kernel dk, dv and column sums; neither adds into memory, so results are the
same every time. The derivation is ours; FlashAttention-2 (Dao 2023) has the case C = 1, dM = 0.
"""

# Triton types compile-time values as constexpr and ranges as opaque; Python passes plain ones
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.dispatch import interpreting
from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.grouped_mass.triton_common import (
    COLUMN_GRADIENTS,
    ROW_GRADIENTS,
    Strides,
    add_by_group,
    at_head,
    by_group,
    group_of,
    known_weights,
    lay,
    load_log_sums,
    prepare,
    present_in,
    sizes_for,
    store_by_group,
    value_settings,
    visible_keys,
    visible_rows,
    zero_by_group,
)
from vlm.kernels.tile import (
    LN2,
    LOG2E,
    accumulator,
    dot,
    key_codes,
    load_tile,
    on_device,
    padded,
    row_codes,
    store_tile,
    unit_stride,
)
from vlm.kernels.visibility import Operands


class Upstream(NamedTuple):
    """What a backward works with. A table [B,H,Q,G] of the accumulator type, contiguous, or None for what is not there.

    coefficient: C; None for 1 everywhere, or where no gradient of the output comes.
    extra: E, either the table or, where it is the same for all groups, [B,H,Q].
    """

    d_out: Float[Tensor, "batch heads rows value_dim"] | None
    lse: Float[Tensor, "batch heads rows"]
    coefficient: Float[Tensor, "batch heads rows groups"] | None
    extra: Float[Tensor, "batch heads rows *groups"] | None


class Columns(NamedTuple):
    """Gradients of keys and values, and sums over selected rows: of ds' and of ds' |s|, each [B,H,K]."""

    dk: Tensor
    dv: Tensor | None
    sums: Tensor | None
    absolute_sums: Tensor | None


def row_dots(a: Float[Tensor, "batch heads rows dim"], b: Float[Tensor, "batch heads rows dim"]) -> Tensor:
    """[batch, heads, rows], the sum over dim of a b, in fp32 (fp64 for fp64)."""
    a, b = unit_stride(a), unit_stride(b)
    batch, heads, rows, dim = a.shape
    out = torch.empty(batch, heads, rows, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    size = 16 if interpreting() else 64
    with on_device(a):
        row_dots_kernel[(triton.cdiv(rows, size) * batch * heads,)](
            a, b, out, Strides.of(a), Strides.of(b), heads, rows, dim, padded(dim), size, accumulator(a.dtype)
        )
    return out


def row_gradients(
    x: Operands, grouping: Grouping, up: Upstream, *, dots: bool, dq: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(T, the sums of p a by group [B,H,Q,G]; dq), each if asked for."""
    batch, heads, rows, _ = x.q.shape
    groups = grouping.rule.groups
    sums = up.lse.new_empty(batch, heads, rows, groups) if dots else None
    d_query = torch.empty_like(x.q) if dq else None
    v = x.v if up.d_out is not None else None
    sizes = sizes_for(ROW_GRADIENTS, x)
    with on_device(x.q):
        launch = prepare(x, grouping, sizes)
        rows_kernel[(triton.cdiv(rows, sizes.rows) * batch * heads,)](
            x.q,
            x.k,
            v,
            *up,
            sums,
            d_query,
            *(Strides.of(x.k if t is None else t) for t in (x.q, x.k, v, up.d_out, d_query)),
            *launch.tables,
            heads,
            rows,
            x.k.shape[2],
            x.scale,
            x.scale * LOG2E.value,
            EXTRA_BY_GROUP=up.extra is not None and up.extra.ndim == 4,
            **value_settings(v),
            **launch.settings,
        )
    return sums, d_query


def column_gradients(x: Operands, grouping: Grouping, up: Upstream, *, sums: bool, absolute_sums: bool) -> Columns:
    """Gradients of keys and values, and the column sums that are asked for."""
    batch, heads, rows, _ = x.q.shape
    keys, kv_heads = x.k.shape[2], x.k.shape[1]
    v = x.v if up.d_out is not None else None
    result = Columns(
        torch.empty_like(x.k),
        None if v is None else torch.empty_like(v),
        *(up.lse.new_empty(batch, heads, keys) if asked else None for asked in (sums, absolute_sums)),
    )
    read = x.head_map()
    order = read.argsort(stable=True)
    start = torch.searchsorted(read[order], torch.arange(kv_heads + 1, dtype=torch.int32, device=read.device))
    sizes = sizes_for(COLUMN_GRADIENTS, x)
    with on_device(x.q):
        launch = prepare(x, grouping, sizes, row_spans=True)
        columns_kernel[(triton.cdiv(keys, sizes.keys) * batch * kv_heads,)](
            x.q,
            x.k,
            v,
            *up,
            *result,
            *(Strides.of(x.k if t is None else t) for t in (x.q, x.k, v, up.d_out, result.dk, result.dv)),
            *launch.tables[:-1],
            order,  # of the query heads: order[start[h] : start[h + 1]] read key head h
            start,
            heads,
            kv_heads,
            rows,
            keys,
            x.scale,
            x.scale * LOG2E.value,
            EXTRA_BY_GROUP=up.extra is not None and up.extra.ndim == 4,
            **value_settings(v),
            **launch.settings,
        )
    return result


@triton.jit(do_not_specialize=["rows"])
def row_dots_kernel(
    a,
    b,
    out,
    a_strides,
    b_strides,
    heads,
    rows,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    tile, head, batch = pid % row_tiles, (pid // row_tiles) % heads, pid // (row_tiles * heads)
    i = tile * ROWS + tl.arange(0, ROWS)
    a_tile = load_tile(at_head(a, a_strides, batch, head), i, a_strides.row, rows, DIM, WIDTH).to(ACC)
    b_tile = load_tile(at_head(b, b_strides, batch, head), i, b_strides.row, rows, DIM, WIDTH).to(ACC)
    line = (batch * heads + head).to(tl.int64) * rows + i
    tl.store(out + line, tl.sum(a_tile * b_tile, 1), mask=i < rows)


@triton.jit
def score_gradient(
    p,
    a,
    coefficient,
    extra,
    line,
    inside,
    group,
    present,
    ROW_AXIS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXTRA_BY_GROUP: tl.constexpr,
):
    """(C p, ds' = C p a + E p). ``a`` is None where no gradient comes from the output."""
    weight = p
    if coefficient is not None:
        weight = p * by_group(coefficient, line, inside, group, present, p, ROW_AXIS, GROUPS)
    if EXTRA_BY_GROUP:
        gradient = p * by_group(extra, line, inside, group, present, p, ROW_AXIS, GROUPS)
    else:
        gradient = p * lay(tl.load(extra + line, mask=inside, other=0.0), ROW_AXIS)
    if a is not None:
        gradient += weight * a
    return weight, gradient


@triton.jit
def through_map(gradient, x, selected, group, score_map, head, ROW_AXIS: tl.constexpr, GROUPS: tl.constexpr):
    """ds of ds': the factor 1 + gamma sign(s) in selected rows."""
    if score_map.gamma is not None:
        gamma = lay(tl.load(score_map.gamma + head * GROUPS + group), 1 - ROW_AXIS)
        sign = tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
        gradient += gradient * (lay(selected, ROW_AXIS) * gamma * sign)
    return gradient


@triton.jit(do_not_specialize=["rows", "keys"])
def rows_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    coefficient,
    extra,
    dots,
    dq,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    dq_strides,
    codes,
    groups,
    score_map,
    row_sel,
    kv_head_of,
    heads,
    rows,
    keys,
    scale,
    scale2,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    EXTRA_BY_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program makes T and dq, or one of them, of ROWS rows of one head."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    tile = row_tiles - 1 - pid % row_tiles
    head, batch = (pid // row_tiles) % heads, pid // (row_tiles * heads)
    i = tile * ROWS + tl.arange(0, ROWS)
    inside = i < rows
    row_position, row_document = row_codes(codes.row_position, codes.row_document, batch, i, rows, keys, BY_INDEX)
    selected = tl.load(row_sel + batch.to(tl.int64) * rows + i, mask=inside, other=0).to(ACC)
    line = (batch * heads + head).to(tl.int64) * rows + i
    log_sum = load_log_sums(lse, line, inside, ACC)
    q_tile = load_tile(at_head(q, q_strides, batch, head), i, q_strides.row, rows, DIM, WIDTH)
    if d_out is not None:
        d_base = at_head(d_out, d_out_strides, batch, head)
        d_tile = load_tile(d_base, i, d_out_strides.row, rows, VALUE_DIM, VALUE_WIDTH)

    kv_head = tl.load(kv_head_of + head)
    k_base, v_base = at_head(k, k_strides, batch, kv_head), at_head(v, v_strides, batch, kv_head)
    last_row = tl.minimum(tile * ROWS + ROWS, rows) - 1
    first, last = visible_keys(batch, last_row, row_position, row_document, codes, rows, keys, CAUSAL, BY_INDEX, KEYS)
    acc = tl.zeros([ROWS, WIDTH], ACC)
    total = zero_by_group(ROWS, GROUPS, ACC)
    for key_tile in range(first, last):
        j = key_tile * KEYS + tl.arange(0, KEYS)
        group, present = group_of(groups, batch, head, j, keys), present_in(groups, batch, head, key_tile)
        k_tile = load_tile(k_base, j, k_strides.row, keys, DIM, WIDTH)
        key_position, key_document = key_codes(codes.key_position, codes.key_document, batch, j, keys, BY_INDEX)
        x, p = known_weights(
            q_tile, k_tile, scale2, log_sum, selected, row_position, row_document, key_position, key_document,
            group, score_map, batch, head, j, keys, 0, CAUSAL, GROUPS, ACC,
        )  # fmt: skip
        a = None
        if d_out is not None:
            v_tile = load_tile(v_base, j, v_strides.row, keys, VALUE_DIM, VALUE_WIDTH)
            a = dot(d_tile, tl.trans(v_tile), ACC)
        if dots is not None:
            total = add_by_group(total, 1.0, p * a, group, present, GROUPS)
        if dq is not None:
            _, ds = score_gradient(p, a, coefficient, extra, line, inside, group, present, 0, GROUPS, EXTRA_BY_GROUP)
            ds = through_map(ds, x, selected, group, score_map, head, 0, GROUPS)
            acc += dot(ds.to(k_tile.dtype), k_tile, ACC)
    if dots is not None:
        store_by_group(dots, line, inside, total, GROUPS)
    if dq is not None:
        value = (acc * scale).to(dq.dtype.element_ty)
        store_tile(at_head(dq, dq_strides, batch, head), i, dq_strides.row, rows, DIM, value, WIDTH)


@triton.jit(do_not_specialize=["rows", "keys"])
def columns_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    coefficient,
    extra,
    dk,
    dv,
    sums,
    absolute_sums,
    q_strides,
    k_strides,
    v_strides,
    d_out_strides,
    dk_strides,
    dv_strides,
    codes,
    groups,
    score_map,
    row_sel,
    head_order,
    head_start,
    heads,
    kv_heads,
    rows,
    keys,
    scale,
    scale2,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    EXTRA_BY_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program makes dk and dv of KEYS keys of one key head, from all query heads that read it.

    Its tiles are [keys, rows]: then p^T and ds^T are at hand as the matrix products want them.
    """
    pid = tl.program_id(0)
    key_tiles = tl.cdiv(keys, KEYS)
    key_tile, kv_head, batch = pid % key_tiles, (pid // key_tiles) % kv_heads, pid // (key_tiles * kv_heads)
    j = key_tile * KEYS + tl.arange(0, KEYS)
    key_position, key_document = key_codes(codes.key_position, codes.key_document, batch, j, keys, BY_INDEX)
    k_tile = load_tile(at_head(k, k_strides, batch, kv_head), j, k_strides.row, keys, DIM, WIDTH)
    if d_out is not None:
        v_tile = load_tile(at_head(v, v_strides, batch, kv_head), j, v_strides.row, keys, VALUE_DIM, VALUE_WIDTH)
    first, last = visible_rows(
        batch, key_tile * KEYS, key_position, key_document, codes, rows, keys, CAUSAL, BY_INDEX, ROWS
    )
    dk_acc, dv_acc = tl.zeros([KEYS, WIDTH], ACC), tl.zeros([KEYS, VALUE_WIDTH], ACC)
    for place in range(tl.load(head_start + kv_head), tl.load(head_start + kv_head + 1)):
        head = tl.load(head_order + place)
        group, present = group_of(groups, batch, head, j, keys), present_in(groups, batch, head, key_tile)
        q_base = at_head(q, q_strides, batch, head)
        d_base = at_head(d_out, d_out_strides, batch, head)
        sum_acc, absolute_acc = tl.zeros([KEYS], ACC), tl.zeros([KEYS], ACC)
        for tile in range(first, last):
            i = tile * ROWS + tl.arange(0, ROWS)
            inside = i < rows
            row_position, row_document = row_codes(
                codes.row_position, codes.row_document, batch, i, rows, keys, BY_INDEX
            )
            selected = tl.load(row_sel + batch.to(tl.int64) * rows + i, mask=inside, other=0).to(ACC)
            line = (batch * heads + head).to(tl.int64) * rows + i
            log_sum = load_log_sums(lse, line, inside, ACC)
            q_tile = load_tile(q_base, i, q_strides.row, rows, DIM, WIDTH)
            x, p = known_weights(
                k_tile, q_tile, scale2, log_sum, selected, row_position, row_document, key_position, key_document,
                group, score_map, batch, head, j, keys, 1, CAUSAL, GROUPS, ACC,
            )  # fmt: skip
            a = None
            if d_out is not None:
                d_tile = load_tile(d_base, i, d_out_strides.row, rows, VALUE_DIM, VALUE_WIDTH)
                a = dot(v_tile, tl.trans(d_tile), ACC)
            weight, ds = score_gradient(
                p, a, coefficient, extra, line, inside, group, present, 1, GROUPS, EXTRA_BY_GROUP
            )
            if d_out is not None:
                dv_acc += dot(weight.to(d_tile.dtype), d_tile, ACC)
            if sums is not None:
                sum_acc += tl.sum(ds * selected[None, :], 1)
            if absolute_sums is not None:
                absolute_acc += tl.sum(ds * selected[None, :] * tl.abs(x), 1)
            ds = through_map(ds, x, selected, group, score_map, head, 1, GROUPS)
            dk_acc += dot(ds.to(q_tile.dtype), q_tile, ACC)
        at = (batch * heads + head).to(tl.int64) * keys + j
        if sums is not None:
            tl.store(sums + at, sum_acc, mask=j < keys)
        if absolute_sums is not None:
            tl.store(absolute_sums + at, absolute_acc * LN2, mask=j < keys)
    value = (dk_acc * scale).to(dk.dtype.element_ty)
    store_tile(at_head(dk, dk_strides, batch, kv_head), j, dk_strides.row, keys, DIM, value, WIDTH)
    if d_out is not None:
        value = dv_acc.to(dv.dtype.element_ty)
        store_tile(at_head(dv, dv_strides, batch, kv_head), j, dv_strides.row, keys, VALUE_DIM, value, VALUE_WIDTH)
