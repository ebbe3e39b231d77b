"""Grouped-mass attention of few rows (decoding): keys split over programs, then put together.

A row tile alone would leave most of a GPU idle. So each program takes some rows and a stretch of the keys, and a
second kernel combines the parts of each row and applies the rule (FlashDecoding, Dao et al. 2023, with groups).
"""

# Triton types compile-time values as constexpr and ranges as opaque; Python passes plain ones
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.grouped_mass.triton_common import (
    DECODING,
    Strides,
    at_head,
    prepare,
    sizes_for,
    store_by_group,
    value_settings,
    visible_keys,
)
from vlm.kernels.grouped_mass.triton_forward import ClosedForm, Result, absorb, finish, new_result, nothing_yet
from vlm.kernels.tile import LOG2E, on_device, row_codes
from vlm.kernels.visibility import Operands

MOST_ROWS = 16  # of a call that counts as decoding
WANTED = 256  # programs that fill a GPU: about two for each multiprocessor
FEWEST_TILES = 2  # key tiles worth a program of their own


def heads_together(x: Operands, grouping: Grouping, form: ClosedForm, most_rows: int) -> int:
    """Query heads that share a key head and may share a program, so that keys are read once for all of them.

    One where a table differs by head, or where the heads of a key head need not follow each other.
    """
    heads, kv_heads, rows = x.q.shape[1], x.k.shape[1], x.q.shape[2]
    ids, bias = grouping.group_ids, grouping.key_bias
    differ = form.per_head or ids.shape[1] > 1 or (bias is not None and bias.shape[1] > 1)
    if x.kv_head_of is not None or differ or grouping.gamma is not None or grouping.beta is not None:
        return 1
    ratio = heads // kv_heads
    return max((n for n in range(1, ratio + 1) if ratio % n == 0 and n * rows <= most_rows), default=1)


def decode(x: Operands, grouping: Grouping, form: ClosedForm) -> Result:
    """What :func:`~vlm.kernels.grouped_mass.triton_forward.forward` gives, for values and a few rows."""
    assert x.v is not None
    batch, heads, rows, _ = x.q.shape
    sizes = sizes_for(DECODING, x)
    together = heads_together(x, grouping, form, sizes.rows)
    sizes = sizes._replace(rows=max(16, triton.next_power_of_2(together * rows)))
    blocks = batch * heads // together
    key_tiles = triton.cdiv(x.k.shape[2], sizes.keys)
    splits = max(1, min(triton.cdiv(WANTED, max(1, blocks)), triton.cdiv(key_tiles, FEWEST_TILES)))

    result, lines, count = new_result(x, grouping.rule.groups), batch * heads * rows, grouping.rule.groups
    options = {"dtype": x.accumulator, "device": x.q.device}
    parts = (
        torch.empty(splits, lines, **options),
        torch.empty(splits, lines, count, **options),
        torch.empty(form.slots, splits, lines, x.v.shape[3], **options),
    )
    with on_device(x.q):
        launch = prepare(x, grouping, sizes)
        shared = {**value_settings(x.v), **form.settings}
        split_kernel[(blocks * splits,)](
            x.q,
            x.k,
            x.v,
            *parts,
            Strides.of(x.q),
            Strides.of(x.k),
            Strides.of(x.v),
            *launch.tables,
            form.terms,
            heads,
            rows,
            x.k.shape[2],
            x.scale * LOG2E.value,
            splits,
            lines,
            TOGETHER=together,
            **shared,
            **launch.settings,
        )
        combine_kernel[(batch * heads,)](
            *result,
            *parts,
            Strides.of(result.out),
            launch.row_sel,
            form.terms,
            heads,
            rows,
            splits,
            lines,
            GROUPS=count,
            ROWS=triton.next_power_of_2(max(1, rows)),
            ACC=launch.settings["ACC"],
            **shared,
        )
    return result


@triton.jit(do_not_specialize=["rows", "keys", "splits", "lines"])
def split_kernel(
    q,
    k,
    v,
    most_part,
    total_part,
    acc_part,
    q_strides,
    k_strides,
    v_strides,
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
    splits,
    lines,
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
    TOGETHER: tl.constexpr,
):
    """A program takes all rows of TOGETHER heads, stacked, and one of ``splits`` equal stretches of the keys."""
    pid = tl.program_id(0)
    split, block = pid % splits, pid // splits
    blocks = heads // TOGETHER
    first_head, batch = (block % blocks) * TOGETHER, block // blocks
    stacked = tl.arange(0, ROWS)
    real = stacked < TOGETHER * rows
    head, i = first_head + stacked // rows, stacked % rows
    row_position, row_document = row_codes(
        codes.row_position, codes.row_document, batch, tl.where(real, i, rows), rows, keys, BY_INDEX
    )
    selected = tl.load(row_sel + batch.to(tl.int64) * rows + i, mask=real, other=0).to(ACC)
    d = tl.arange(0, WIDTH)
    at = head.to(tl.int64) * q_strides.head + i.to(tl.int64) * q_strides.row
    q_base = q + batch.to(tl.int64) * q_strides.batch
    q_tile = tl.load(q_base + at[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < DIM), other=0.0)

    kv_head = tl.load(kv_head_of + first_head)
    k_base, v_base = at_head(k, k_strides, batch, kv_head), at_head(v, v_strides, batch, kv_head)
    first, last = visible_keys(batch, rows - 1, row_position, row_document, codes, rows, keys, CAUSAL, BY_INDEX, KEYS)
    stretch = tl.cdiv(tl.maximum(last - first, 0), splits)
    first += split * stretch
    most, total, acc0, acc1, acc2 = nothing_yet(ROWS, GROUPS, VALUE_WIDTH, SLOTS, ACC)
    for key_tile in range(first, tl.minimum(first + stretch, last)):
        most, total, acc0, acc1, acc2 = absorb(
            q_tile, selected, row_position, row_document, key_tile,
            k_base, v_base, k_strides.row, v_strides.row, codes, groups, score_map, terms,
            batch, first_head, keys, scale,
            most, total, acc0, acc1, acc2,
            CAUSAL, BY_INDEX, KIND, SLOTS, GROUPS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, KEYS, ACC,
        )  # fmt: skip

    line = (batch * heads + head).to(tl.int64) * rows + i
    here = split.to(tl.int64) * lines + line
    tl.store(most_part + here, most, mask=real)
    store_by_group(total_part, here, real, total, GROUPS)
    step = lines.to(tl.int64) * splits
    store_part(acc_part, here, real, acc0, VALUE_DIM, VALUE_WIDTH)
    if SLOTS > 1:
        store_part(acc_part, here + step, real, acc1, VALUE_DIM, VALUE_WIDTH)
    if SLOTS > 2:
        store_part(acc_part, here + step * 2, real, acc2, VALUE_DIM, VALUE_WIDTH)


@triton.jit
def store_part(base, line, real, value, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    d = tl.arange(0, VALUE_WIDTH)[None, :]
    tl.store(base + line[:, None] * VALUE_DIM + d, value, mask=real[:, None] & (d < VALUE_DIM))


@triton.jit
def add_part(base, line, real, acc, shrink, grow, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    d = tl.arange(0, VALUE_WIDTH)[None, :]
    part = tl.load(base + line[:, None] * VALUE_DIM + d, mask=real[:, None] & (d < VALUE_DIM), other=0.0)
    return acc * shrink[:, None] + part * grow[:, None]


@triton.jit(do_not_specialize=["rows", "splits", "lines"])
def combine_kernel(
    out,
    mass,
    lse,
    most_part,
    total_part,
    acc_part,
    out_strides,
    row_sel,
    terms,
    heads,
    rows,
    splits,
    lines,
    KIND: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program puts the parts of all rows of one head together."""
    pid = tl.program_id(0)
    head, batch = pid % heads, pid // heads
    i = tl.arange(0, ROWS)
    real = i < rows
    selected = tl.load(row_sel + batch.to(tl.int64) * rows + i, mask=real, other=0).to(ACC)
    most, total, acc0, acc1, acc2 = nothing_yet(ROWS, GROUPS, VALUE_WIDTH, SLOTS, ACC)
    line = pid.to(tl.int64) * rows + i
    step = lines.to(tl.int64) * splits
    for _ in range(0, splits):
        part = tl.load(most_part + line, mask=real, other=float("-inf"))
        new_most = tl.maximum(most, part)
        safe = tl.where(new_most == float("-inf"), 0.0, new_most)
        shrink, grow = tl.exp2(most - safe), tl.exp2(part - safe)
        sums = ()
        for g in tl.static_range(GROUPS):
            part = tl.load(total_part + line * GROUPS + g, mask=real, other=0.0)
            sums += (total[g] * shrink + part * grow,)
        total = sums
        acc0 = add_part(acc_part, line, real, acc0, shrink, grow, VALUE_DIM, VALUE_WIDTH)
        if SLOTS > 1:
            acc1 = add_part(acc_part, line + step, real, acc1, shrink, grow, VALUE_DIM, VALUE_WIDTH)
        if SLOTS > 2:
            acc2 = add_part(acc_part, line + step * 2, real, acc2, shrink, grow, VALUE_DIM, VALUE_WIDTH)
        most = new_most
        line += lines
    finish(
        out, mass, lse, out_strides, batch, head, heads, i, rows, selected, terms,
        most, total, acc0, acc1, acc2, KIND, SLOTS, GROUPS, VALUE_DIM, VALUE_WIDTH, ACC,
    )  # fmt: skip
