"""The second pass for rules that no kernel knows: values summed with coefficients that torch computed.

The first pass over the keys gives log-sum-exps and masses, torch makes coefficients of them (any Python, with
autograd), the second pass over keys and values gives the output. It needs no online softmax and one accumulator,
and computes all scores twice: half as much work again as one pass.
"""

# Triton types compile-time values as constexpr and ranges as opaque; Python passes plain ones
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.grouped_mass.triton_common import (
    SECOND_PASS,
    Strides,
    at_head,
    by_group,
    group_of,
    known_weights,
    load_log_sums,
    prepare,
    present_in,
    sizes_for,
    value_settings,
    visible_keys,
)
from vlm.kernels.grouped_mass.triton_forward import new_output
from vlm.kernels.tile import LOG2E, dot, key_codes, load_tile, on_device, row_codes, store_tile
from vlm.kernels.visibility import Operands


def second_pass(
    x: Operands,
    grouping: Grouping,
    lse: Float[Tensor, "batch heads rows"],
    coefficient: Float[Tensor, "batch heads rows groups"],
) -> Float[Tensor, "batch heads rows value_dim"]:
    """Output with these coefficients; ``lse`` is that of the first pass. Both contiguous, of the accumulator type."""
    assert x.v is not None
    batch, heads, rows, _ = x.q.shape
    out = new_output(x)
    sizes = sizes_for(SECOND_PASS, x)
    with on_device(x.q):
        launch = prepare(x, grouping, sizes)
        second_pass_kernel[(triton.cdiv(rows, sizes.rows) * batch * heads,)](
            x.q,
            x.k,
            x.v,
            out,
            lse,
            coefficient,
            Strides.of(x.q),
            Strides.of(x.k),
            Strides.of(x.v),
            Strides.of(out),
            *launch.tables,
            heads,
            rows,
            x.k.shape[2],
            x.scale * LOG2E.value,
            **value_settings(x.v),
            **launch.settings,
        )
    return out


@triton.jit(do_not_specialize=["rows", "keys"])
def second_pass_kernel(
    q,
    k,
    v,
    out,
    lse,
    coefficient,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    codes,
    groups,
    score_map,
    row_sel,
    kv_head_of,
    heads,
    rows,
    keys,
    scale,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program makes ROWS rows of one head."""
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

    kv_head = tl.load(kv_head_of + head)
    k_base, v_base = at_head(k, k_strides, batch, kv_head), at_head(v, v_strides, batch, kv_head)
    last_row = tl.minimum(tile * ROWS + ROWS, rows) - 1
    first, last = visible_keys(batch, last_row, row_position, row_document, codes, rows, keys, CAUSAL, BY_INDEX, KEYS)
    acc = tl.zeros([ROWS, VALUE_WIDTH], ACC)
    for key_tile in range(first, last):
        j = key_tile * KEYS + tl.arange(0, KEYS)
        group, present = group_of(groups, batch, head, j, keys), present_in(groups, batch, head, key_tile)
        k_tile = load_tile(k_base, j, k_strides.row, keys, DIM, WIDTH)
        v_tile = load_tile(v_base, j, v_strides.row, keys, VALUE_DIM, VALUE_WIDTH)
        key_position, key_document = key_codes(codes.key_position, codes.key_document, batch, j, keys, BY_INDEX)
        _, p = known_weights(
            q_tile, k_tile, scale, log_sum, selected, row_position, row_document, key_position, key_document,
            group, score_map, batch, head, j, keys, 0, CAUSAL, GROUPS, ACC,
        )  # fmt: skip
        p *= by_group(coefficient, line, inside, group, present, p, 0, GROUPS)
        acc += dot(p.to(v_tile.dtype), v_tile, ACC)
    value = acc.to(out.dtype.element_ty)
    store_tile(at_head(out, out_strides, batch, head), i, out_strides.row, rows, VALUE_DIM, value, VALUE_WIDTH)
