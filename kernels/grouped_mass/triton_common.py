"""What the Triton kernels of grouped-mass attention share: tables for a launch, key tiles, and the map of scores.

A *tile* is a block of rows or keys. The keys of a tile have few groups, mostly one, so a pre-pass writes one integer
per key tile: bit g says that group g has a visible key there. Kernels then spend work on groups that are present only.

Helpers that work on a tile take the axis on which it holds its rows, 0 or 1: the kernel for the gradients of keys
and values works on transposed tiles.
"""

# Triton types compile-time values as constexpr and ranges as opaque; Python passes plain ones
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm.kernels.dispatch import interpreting
from vlm.kernels.grouped_mass.reference import Grouping
from vlm.kernels.tile import LOG2E, Tiles, accumulator, codes_of, dot, padded, unit_stride
from vlm.kernels.visibility import Operands

FAR: tl.constexpr = tl.constexpr(2**31 - 1)  # a position and a document that none is beyond
NO_DOCUMENT: tl.constexpr = tl.constexpr(-1)  # below every real one
SPAN: tl.constexpr = tl.constexpr(4)  # numbers per tile: least and greatest position, least and greatest document


# Rows, keys, warps and stages by width of a head, then for fp32. Found by compiling for sm_90: the largest that leave
# all or nearly all in registers (fp32 is multiplied on the plain cores, where tiles must be small). Not timed.
ONE_SLOT = {
    64: (Tiles(128, 64, 4, 3), Tiles(64, 32, 8, 2)),
    128: (Tiles(128, 64, 8, 2), Tiles(32, 32, 8, 2)),
    256: (Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 1)),
}
MORE_SLOTS = {
    64: (Tiles(128, 32, 8, 2), Tiles(32, 32, 8, 2)),
    128: (Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 1)),
    256: (Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
}
DECODING = {  # rows: of all heads that a program may take
    64: (Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 2)),
    128: (Tiles(32, 64, 8, 2), Tiles(16, 32, 8, 1)),
    256: (Tiles(16, 32, 8, 2), Tiles(16, 32, 8, 1)),
}
SECOND_PASS = {
    64: (Tiles(128, 64, 8, 2), Tiles(32, 32, 8, 2)),
    128: (Tiles(64, 64, 8, 2), Tiles(16, 32, 8, 1)),
    256: (Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
}
ROW_GRADIENTS = {
    64: (Tiles(128, 64, 8, 2), Tiles(32, 32, 8, 1)),
    128: (Tiles(128, 32, 8, 2), Tiles(16, 32, 8, 1)),
    256: (Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1)),
}
COLUMN_GRADIENTS = {
    64: (Tiles(32, 128, 8, 2), Tiles(32, 32, 8, 1)),
    128: (Tiles(32, 128, 8, 2), Tiles(16, 32, 8, 1)),
    256: (Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1)),
}


def sizes_for(table: dict[int, tuple[Tiles, Tiles]], x: Operands) -> Tiles:
    """Tile sizes for these operands; small under the interpreter, so that tests meet borders of tiles."""
    if interpreting():
        return Tiles(16, 16, 4, 1)
    dim = max(x.q.shape[3], 1 if x.v is None else x.v.shape[3])
    return table[next(width for width in table if dim <= width)][x.q.dtype == torch.float32]


class Strides(NamedTuple):
    batch: int
    head: int
    row: int

    @staticmethod
    def of(x: Tensor) -> "Strides":
        return Strides(*x.stride()[:3])


class Codes(NamedTuple):
    """Who sees whom, see ``Visibility.codes``; the spans [B, tiles, 4] of key tiles and, if asked for, of row tiles.

    None of it is read when visibility goes by index.
    """

    row_position: Tensor
    key_position: Tensor
    row_document: Tensor
    key_document: Tensor
    key_spans: Tensor
    row_spans: Tensor | None


class Groups(NamedTuple):
    """Group ids [B, 1 or H, K] by strides, and which are present in each key tile, [B, 1 or H, tiles]."""

    ids: Tensor
    ids_batch: int
    ids_head: int
    present: Tensor
    present_batch: int
    present_head: int


class ScoreMap(NamedTuple):
    """In selected rows a score s becomes s + gamma |s| + beta + bias; what is None is left out."""

    gamma: Tensor | None
    beta: Tensor | None
    bias: Tensor | None
    bias_batch: int
    bias_head: int


class Launch(NamedTuple):
    """Everything but q, k, v and the results that a kernel takes, and its compile-time settings."""

    codes: Codes
    groups: Groups
    score_map: ScoreMap
    row_sel: Tensor
    kv_head_of: Tensor
    settings: dict[str, Any]

    @property
    def tables(self) -> tuple[Any, ...]:
        return self[:-1]


def prepare(x: Operands, grouping: Grouping, tiles: Tiles, *, row_spans: bool = False) -> Launch:
    """Tables for kernels with these tile sizes; runs the pre-pass over keys and, for ``row_spans``, over rows."""
    batch, keys = x.q.shape[0], x.k.shape[2]
    by_index, *vectors = codes_of(x)
    ids = unit_stride(grouping.group_ids)
    id_heads, key_tiles = ids.shape[1], triton.cdiv(keys, tiles.keys)
    number = {"dtype": torch.int32, "device": x.q.device}
    present = torch.empty(batch, id_heads, key_tiles, **number)
    key_spans = torch.empty(0 if by_index else batch, key_tiles, SPAN.value, **number)
    groups = Groups(
        ids,
        ids.stride(0),
        ids.stride(1) if id_heads > 1 else 0,
        present,
        present.stride(0),
        present.stride(1) if id_heads > 1 else 0,
    )
    _, key_position, _, key_document = vectors
    describe_keys_kernel[(batch * id_heads * key_tiles,)](
        key_position, key_document, groups, key_spans, id_heads, keys, grouping.rule.groups, by_index, tiles.keys
    )
    spans_of_rows = _row_spans(x, tiles, vectors) if row_spans and not by_index else None
    per_head = [None if t is None else t.to(x.accumulator).contiguous() for t in (grouping.gamma, grouping.beta)]
    bias = None if grouping.key_bias is None else unit_stride(grouping.key_bias)
    bias_strides = (0, 0) if bias is None else (bias.stride(0), bias.stride(1) if bias.shape[1] > 1 else 0)
    settings = {
        "CAUSAL": x.seen.causal,
        "BY_INDEX": by_index,
        "GROUPS": grouping.rule.groups,
        "DIM": x.q.shape[3],
        "WIDTH": padded(x.q.shape[3]),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "ACC": accumulator(x.q.dtype),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    codes = Codes(*vectors, key_spans, spans_of_rows)
    score_map = ScoreMap(*per_head, bias, *bias_strides)
    return Launch(codes, groups, score_map, grouping.row_sel.contiguous(), x.head_map(), settings)


def value_settings(v: Tensor | None) -> dict[str, int]:
    """The compile-time sizes of values; without any, the smallest."""
    dim = 1 if v is None else v.shape[3]
    return {"VALUE_DIM": dim, "VALUE_WIDTH": 1 if v is None else padded(dim)}


def _row_spans(x: Operands, tiles: Tiles, vectors: list[Tensor]) -> Tensor:
    batch, rows = x.q.shape[0], x.q.shape[2]
    count = triton.cdiv(rows, tiles.rows)
    spans = torch.empty(batch, count, SPAN.value, dtype=torch.int32, device=x.q.device)
    row_position, _, row_document, _ = vectors
    describe_rows_kernel[(batch * count,)](row_position, row_document, spans, rows, tiles.rows)
    return spans


# The pre-pass


@triton.jit
def span_of(position, document):
    """Least and greatest position and document of those that are not hidden; an empty span contains nothing."""
    real = document >= 0
    least, greatest = tl.min(tl.where(real, position, FAR), 0), tl.max(tl.where(real, position, -FAR), 0)
    return least, greatest, tl.min(tl.where(real, document, FAR), 0), tl.max(tl.where(real, document, NO_DOCUMENT), 0)


@triton.jit
def store_span(spans, tile, position, document):
    least_position, greatest_position, least_document, greatest_document = span_of(position, document)
    tl.store(spans + tile * SPAN, least_position)
    tl.store(spans + tile * SPAN + 1, greatest_position)
    tl.store(spans + tile * SPAN + 2, least_document)
    tl.store(spans + tile * SPAN + 3, greatest_document)


@triton.jit(do_not_specialize=["rows"])
def describe_rows_kernel(position, document, spans, rows, ROWS: tl.constexpr):
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS)
    i = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    at = (pid // tiles).to(tl.int64) * rows + i
    inside = i < rows
    store_span(spans, pid, tl.load(position + at, mask=inside, other=0), tl.load(document + at, mask=inside, other=-1))


@triton.jit(do_not_specialize=["keys"])
def describe_keys_kernel(
    position,
    document,
    groups,
    spans,
    heads,
    keys,
    GROUPS: tl.constexpr,
    BY_INDEX: tl.constexpr,
    KEYS: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(keys, KEYS)
    tile, head, batch = pid % tiles, (pid // tiles) % heads, pid // (tiles * heads)
    j = tile * KEYS + tl.arange(0, KEYS)
    inside = j < keys
    visible = inside
    if not BY_INDEX:
        at = batch.to(tl.int64) * keys + j
        document_here = tl.load(document + at, mask=inside, other=-1)
        visible = document_here >= 0
        if head == 0:
            store_span(spans, batch * tiles + tile, tl.load(position + at, mask=inside, other=0), document_here)
    group = group_of(groups, batch, head, j, keys)
    present = 0
    for g in tl.static_range(GROUPS):
        present += tl.max((visible & (group == g)).to(tl.int32), 0) << g
    tl.store(groups.present + batch * groups.present_batch + head * groups.present_head + tile, present)


# Inside a kernel


@triton.jit
def at_head(base, strides, batch, head):
    """Where the [length, dim] matrix of one head starts; None where there is no tensor."""
    start = base
    if base is not None:
        start += batch.to(tl.int64) * strides.batch + head.to(tl.int64) * strides.head
    return start


@triton.jit
def group_of(groups, batch, head, j, keys):
    """[len(j)] int32, the groups of keys j."""
    base = groups.ids + batch.to(tl.int64) * groups.ids_batch + head.to(tl.int64) * groups.ids_head
    return tl.load(base + j, mask=j < keys, other=0).to(tl.int32)


@triton.jit
def present_in(groups, batch, head, key_tile):
    """Bit g says whether group g has a visible key in a key tile."""
    base = groups.present + batch.to(tl.int64) * groups.present_batch + head.to(tl.int64) * groups.present_head
    return tl.load(base + key_tile)


@triton.jit
def lay(x, AXIS: tl.constexpr):
    """A vector as a column (it runs along axis 0) or as a row (along axis 1) of a tile."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def visible_keys(
    batch,
    last_row,
    row_position,
    row_document,
    codes,
    rows,
    keys,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    KEYS: tl.constexpr,
):
    """[first, last) of the key tiles that some row of a tile may see; a tile between them may be invisible."""
    tiles = tl.cdiv(keys, KEYS)
    if BY_INDEX:
        first, last = 0, tiles
        if CAUSAL:
            last = tl.cdiv(tl.maximum(tl.minimum(keys, last_row + 1 + keys - rows), 0), KEYS)
    else:
        spans = codes.key_spans + batch.to(tl.int64) * tiles * SPAN
        _, greatest, least_document, greatest_document = span_of(row_position, row_document)
        first, last = overlapping(spans, tiles, -FAR, greatest, least_document, greatest_document, CAUSAL)
    return first, last


@triton.jit
def visible_rows(
    batch,
    first_key,
    key_position,
    key_document,
    codes,
    rows,
    keys,
    CAUSAL: tl.constexpr,
    BY_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[first, last) of the row tiles that may see some key of a tile."""
    tiles = tl.cdiv(rows, ROWS)
    if BY_INDEX:
        first, last = 0, tiles
        if CAUSAL:
            first = tl.maximum(first_key - (keys - rows), 0) // ROWS
    else:
        spans = codes.row_spans + batch.to(tl.int64) * tiles * SPAN
        least, _, least_document, greatest_document = span_of(key_position, key_document)
        first, last = overlapping(spans, tiles, least, FAR, least_document, greatest_document, CAUSAL)
    return first, last


@triton.jit
def overlapping(spans, tiles, least, greatest, least_document, greatest_document, CAUSAL: tl.constexpr):
    """[first, last) of the tiles that share a document and, if causal, whose positions meet [least, greatest]."""
    first, last = tiles, 0
    for start in range(0, tiles, 64):
        tile = start + tl.arange(0, 64)
        inside = tile < tiles
        at = spans + tile * SPAN
        meets = inside & (tl.load(at + 2, mask=inside, other=0) <= greatest_document)
        meets = meets & (tl.load(at + 3, mask=inside, other=0) >= least_document)
        if CAUSAL:
            meets = meets & (tl.load(at, mask=inside, other=0) <= greatest)
            meets = meets & (tl.load(at + 1, mask=inside, other=0) >= least)
        first = tl.minimum(first, tl.min(tl.where(meets, tile, tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, tile + 1, 0), 0))
    return first, last


@triton.jit
def seen_pairs(row_position, row_document, key_position, key_document, ROW_AXIS: tl.constexpr, CAUSAL: tl.constexpr):
    """Which pairs of a tile see each other."""
    seen = lay(row_document, ROW_AXIS) == lay(key_document, 1 - ROW_AXIS)
    if CAUSAL:
        seen = seen & (lay(key_position, 1 - ROW_AXIS) <= lay(row_position, ROW_AXIS))
    return seen


@triton.jit
def known_weights(
    a,
    b,
    scale,
    log_sum,
    selected,
    row_position,
    row_document,
    key_position,
    key_document,
    group,
    score_map,
    batch,
    head,
    j,
    keys,
    ROW_AXIS: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores before the map (times log2 e) and softmax weights of a tile whose log-sum-exps are known.

    a, b: queries and keys where rows run along axis 0, else keys and queries.
    """
    x = dot(a, tl.trans(b), ACC) * scale
    y = map_scores(x, selected, group, score_map, batch, head, j, keys, ROW_AXIS, GROUPS, ACC)
    seen = seen_pairs(row_position, row_document, key_position, key_document, ROW_AXIS, CAUSAL)
    return x, tl.where(seen, tl.exp2(y - lay(log_sum, ROW_AXIS)), 0.0)


@triton.jit
def load_log_sums(lse, line, inside, ACC: tl.constexpr):
    """Log-sum-exps of base 2; of a row that sees nothing +inf, so that its weights are 0."""
    log_sum = tl.load(lse + line, mask=inside, other=float("-inf")).to(ACC) * LOG2E
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum)


@triton.jit
def map_scores(
    x, selected, group, score_map, batch, head, j, keys, ROW_AXIS: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr
):
    """Scores (times log2 e) after the map; ``selected`` is 1 in rows where it acts and 0 elsewhere."""
    y = x
    act = lay(selected, ROW_AXIS)
    if score_map.gamma is not None:
        gamma = tl.load(score_map.gamma + head * GROUPS + group)
        y += act * lay(gamma, 1 - ROW_AXIS) * tl.abs(x)
    if score_map.beta is not None:
        beta = tl.load(score_map.beta + head * GROUPS + group) * LOG2E
        y += act * lay(beta, 1 - ROW_AXIS)
    if score_map.bias is not None:
        base = score_map.bias + batch.to(tl.int64) * score_map.bias_batch + head.to(tl.int64) * score_map.bias_head
        bias = tl.load(base + j, mask=j < keys, other=0.0).to(ACC) * LOG2E
        y += act * lay(bias, 1 - ROW_AXIS)
    return y


@triton.jit
def by_group(table, line, inside, group, present, like, ROW_AXIS: tl.constexpr, GROUPS: tl.constexpr):
    """table[line of the row, group of the key] over a tile like ``like``: a step for each group that is present."""
    value = tl.zeros_like(like)
    for g in tl.static_range(GROUPS):
        if (present >> g) & 1:
            of_rows = tl.load(table + line * GROUPS + g, mask=inside, other=0.0)
            value = tl.where(lay(group == g, 1 - ROW_AXIS), lay(of_rows, ROW_AXIS), value)
    return value


@triton.jit
def zero_by_group(ROWS: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr):
    """A sum for each group: a tuple, since each then lies in registers as sums over a tile's keys do."""
    total = ()
    for _ in tl.static_range(GROUPS):
        total += (tl.zeros([ROWS], ACC),)
    return total


@triton.jit
def add_by_group(total, shrink, x, group, present, GROUPS: tl.constexpr):
    """The sums times ``shrink`` and the sums over keys of x [rows, keys]."""
    added = ()
    for g in tl.static_range(GROUPS):
        here = total[g] * shrink
        if (present >> g) & 1:
            here += tl.sum(tl.where((group == g)[None, :], x, 0.0), 1)
        added += (here,)
    return added


@triton.jit
def store_by_group(base, line, inside, total, GROUPS: tl.constexpr):
    for g in tl.static_range(GROUPS):
        tl.store(base + line * GROUPS + g, total[g], mask=inside)
