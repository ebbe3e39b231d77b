"""Received attention in Triton, forward: the column pass, and the log-sum-exp of the chosen rows when none is given.

The chosen rows are gathered once. A program of the column pass keeps one tile of keys, walks over the rows and adds
up p per (key, row of the tile), so that it reduces over rows once, at its end. Long walks are split over programs
whose partial results torch adds up. One pass over K for the column pass, one for the log-sum-exp.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels.tile import (
    LN2,
    LOG2E,
    Tiles,
    accumulator,
    dot,
    key_codes,
    load_tile,
    on_device,
    padded,
    row_codes,
    sees,
    tiles,
    unit_stride,
)
from vlm.kernels.visibility import Operands

GIVEN: tl.constexpr = tl.constexpr(False)  # who sees whom is read from codes, not worked out by index
PROCESSORS_INTERPRETED = 4  # stands for a GPU's, so that tests meet walks that are split and walks that are not


class Walk(NamedTuple):
    """How programs that keep one tile each walk over the tiles of the other side."""

    tiles: Tiles
    grid: tuple[int, int]  # (tiles that are kept times heads, splits)
    splits: int  # programs that share one walk
    steps: int  # of each of them
    bound: Tensor | None  # per sample and kept tile where the walk begins or ends; None where nothing can be skipped


@dataclass(frozen=True)
class Chosen:
    """The chosen rows beside the keys, as every kernel here takes them. ``dim`` is filled up to a multiple of 16."""

    q: Float[Tensor, "batch heads chosen dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    weight: Float[Tensor, "batch chosen"]
    row_position: Int[Tensor, "batch chosen"]
    key_position: Int[Tensor, "batch keys"]
    row_document: Int[Tensor, "batch chosen"]
    key_document: Int[Tensor, "batch keys"]
    kv_head_of: Int[Tensor, " heads"]
    scale: float
    causal: bool

    @staticmethod
    def of(x: Operands, rows: Int[Tensor, "batch chosen"], row_weight: Float[Tensor, "batch chosen"]) -> "Chosen":
        batch, heads, _, dim = x.q.shape
        q = x.q.gather(2, rows.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, dim))
        k, short = unit_stride(x.k), -dim % 16
        if short:  # of other sizes Triton loads one number at a time
            q, k = (torch.nn.functional.pad(each, (0, short)) for each in (q, k))
        codes = x.seen.pick(rows).codes(batch)
        return Chosen(q, k, row_weight.contiguous(), *codes, x.head_map(), x.scale, x.seen.causal)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are tensors, in their order."""
        codes = (self.row_position, self.key_position, self.row_document, self.key_document)
        return (self.q, self.k, self.weight, *codes, self.kv_head_of)

    @property
    def accumulator(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def heads(self) -> int:
        """Query heads of all samples."""
        return self.q.shape[0] * self.q.shape[1]

    def walk_keys(self, accumulators: int = 1) -> Walk:
        """For programs that keep a tile of rows. It ends before the first tile of keys from which on all are later."""
        t = self._tiles(accumulators)
        row_tiles, key_tiles = triton.cdiv(self.q.shape[2], t.rows), triton.cdiv(self.k.shape[2], t.keys)
        end = None
        if self.causal and row_tiles and key_tiles > 1:
            after = _earliest(self.key_position, t.keys).flip(1).cummin(1).values.flip(1)  # here or in a later tile
            latest = _latest(self.row_position, t.rows)  # [B,row tiles]
            end = torch.searchsorted(after.contiguous(), latest, right=True, out_int32=True)
        return self._walk(t, row_tiles * self.heads, key_tiles, end)

    def walk_rows(self, accumulators: int = 1, by_key_head: bool = False) -> Walk:
        """For programs that keep a tile of keys. It begins with the first tile of rows that is not all earlier."""
        t = self._tiles(accumulators)
        t = t._replace(rows=min(t.rows, t.keys), keys=max(t.rows, t.keys))
        row_tiles, key_tiles = triton.cdiv(self.q.shape[2], t.rows), triton.cdiv(self.k.shape[2], t.keys)
        first = None
        if self.causal and row_tiles > 1 and key_tiles:
            until = _latest(self.row_position, t.rows).cummax(1).values  # here or in an earlier tile
            first = torch.searchsorted(until, _earliest(self.key_position, t.keys), out_int32=True)
        heads = self.k.shape[0] * self.k.shape[1] if by_key_head else self.heads
        return self._walk(t, key_tiles * heads, row_tiles, first)

    def _tiles(self, accumulators: int) -> Tiles:
        dim, few = padded(self.q.shape[3]), max(16, triton.next_power_of_2(self.q.shape[2]))
        t = tiles(dim, self.q.dtype, accumulators)
        if self.q.dtype == torch.float32:  # exact products take the plain cores, where larger tiles spill (sm_90)
            t = Tiles(min(t.rows, 32 if dim <= 128 else 16), min(t.keys, 32), 8, t.stages)
        if few < 64 and accumulators > 1:  # beside few rows wide tiles of keys spill as well
            t = t._replace(keys=min(t.keys, 32))
        return t._replace(rows=min(t.rows, few))

    def _walk(self, t: Tiles, programs: int, steps: int, bound: Tensor | None) -> Walk:
        """Split so that the device has programs enough."""
        device, processors = self.q.device, PROCESSORS_INTERPRETED
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        each = triton.cdiv(steps, max(1, min(steps, 2 * processors // max(1, programs))))
        splits = max(1, triton.cdiv(steps, max(1, each)))
        return Walk(t, (programs, splits), splits, each, bound)

    def inputs(self) -> tuple[Any, ...]:
        """The arguments that every kernel begins with."""
        codes = (self.row_position, self.key_position, self.row_document, self.key_document)
        sizes = (self.q.shape[1], self.q.shape[2], self.k.shape[2], self.q.shape[3])
        return (self.q, self.k, self.kv_head_of, *codes, *sizes, *self.k.stride()[:3], self.scale)

    def launch(self, kernel: Any, walk: Walk, *arguments: Any, **constants: Any) -> None:
        """Run ``kernel`` over the walk; an argument of None is a pointer that it never reads."""
        constants |= {"CAUSAL": self.causal, "BOUNDED": walk.bound is not None, "DIM": padded(self.q.shape[3])}
        constants |= {"ROWS": walk.tiles.rows, "KEYS": walk.tiles.keys, "ACC": accumulator(self.q.dtype)}
        constants |= {"num_warps": walk.tiles.warps, "num_stages": walk.tiles.stages}
        if walk.grid[0]:
            with on_device(self.q):
                kernel[walk.grid](*self.inputs(), walk.steps, walk.bound, *arguments, **constants)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.accumulator, device=self.q.device)


def log_sum_exp(chosen: Chosen) -> Float[Tensor, "batch heads chosen"]:
    """Natural log-sum-exp of the chosen rows, -inf for one that sees nothing."""
    walk = chosen.walk_keys()
    out = chosen.empty(walk.splits, *chosen.q.shape[:3])
    chosen.launch(_log_sum_exp_kernel, walk, out)
    return out.logsumexp(0)


def column_pass(
    chosen: Chosen, lse: Float[Tensor, "batch heads chosen"], reduce: str, keep_place: bool = False
) -> tuple[Float[Tensor, "batch heads keys"], Int[Tensor, "batch heads keys"] | None]:
    """What each key receives; with ``keep_place`` and a maximum also which of the chosen rows it is, -1 for none."""
    walk = chosen.walk_rows(accumulators=2 if reduce == "max" else 1)
    out = chosen.empty(walk.splits, *chosen.q.shape[:2], chosen.k.shape[2])
    place = torch.empty_like(out, dtype=torch.int32) if keep_place and reduce == "max" else None
    chosen.launch(
        _column_pass_kernel, walk, lse.contiguous(), chosen.weight, out, place, REDUCE=reduce, PLACE=place is not None
    )
    if reduce != "max":
        return add_up(out), None
    best = out.argmax(0, keepdim=True)  # of equals the first
    return out.gather(0, best)[0], None if place is None else place.gather(0, best)[0]


def add_up(out: Float[Tensor, "splits *rest"]) -> Float[Tensor, "*rest"]:
    """The partial results of programs that shared a walk."""
    return out[0] if len(out) == 1 else out.sum(0)


def _by_tile(position: Int[Tensor, "batch length"], tile: int, fill: int) -> Int[Tensor, "batch tiles tile"]:
    short = -position.shape[1] % tile
    return torch.nn.functional.pad(position, (0, short), value=fill).unflatten(1, (-1, tile))


def _latest(position: Int[Tensor, "batch length"], tile: int) -> Int[Tensor, "batch tiles"]:
    return _by_tile(position, tile, torch.iinfo(torch.int32).min).amax(2)


def _earliest(position: Int[Tensor, "batch length"], tile: int) -> Int[Tensor, "batch tiles"]:
    return _by_tile(position, tile, torch.iinfo(torch.int32).max).amin(2)


@triton.jit
def probability(scores, lse, row_position, row_document, key_position, key_document, scale, CAUSAL: tl.constexpr):
    """p of a tile either way round: all but the scores come shaped to broadcast along it. ``lse`` is of base 2."""
    seen = row_document == key_document
    if CAUSAL:
        seen = seen & (key_position <= row_position)
    return tl.where(seen, tl.exp2(scores * (scale * LOG2E) - lse), 0.0)


@triton.jit
def load_lse(lse, head, i, rows):
    """Log-sum-exp of places i in base 2; +inf, so that p is 0, where a row sees nothing."""
    value = tl.load(lse + head.to(tl.int64) * rows + i, mask=i < rows, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "steps"])
def _log_sum_exp_kernel(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, steps, end, out,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head of one sample (``head`` counts over both), some of the keys."""
    row_tiles, split = tl.cdiv(rows, ROWS), tl.program_id(1)
    row_tile, head = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    batch = head // heads
    i = row_tile * ROWS + tl.arange(0, ROWS)
    q_tile = load_tile(q + head.to(tl.int64) * rows * dim, i, dim, rows, dim, DIM)
    row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, GIVEN)
    k += batch.to(tl.int64) * k_batch + tl.load(kv_head_of + head % heads).to(tl.int64) * k_head
    stop = tl.minimum(split * steps + steps, tl.cdiv(keys, KEYS))
    if BOUNDED:
        stop = tl.minimum(stop, tl.load(end + batch * row_tiles + row_tile))
    most = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    for tile in range(split * steps, stop):
        j = tile * KEYS + tl.arange(0, KEYS)
        k_tile = load_tile(k, j, k_key, keys, dim, DIM)
        key_at, key_in = key_codes(key_position, key_document, batch, j, keys, GIVEN)
        scores = dot(q_tile, tl.trans(k_tile), ACC) * (scale * LOG2E)
        scores = tl.where(sees(row_at, row_in, key_at, key_in, CAUSAL), scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
        most = new
    value = (most + tl.log2(tl.where(total > 0, total, 1.0))) * LN2
    at = (split * (tl.num_programs(0) // row_tiles) + head).to(tl.int64) * rows + i
    tl.store(out + at, value, mask=i < rows)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "steps"])
def _column_pass_kernel(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, steps, first, lse, weight, out, place,
    REDUCE: tl.constexpr, PLACE: tl.constexpr, BOUNDED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of keys, one head of one sample (``head`` counts over both), some of the rows."""
    key_tiles, split = tl.cdiv(keys, KEYS), tl.program_id(1)
    key_tile, head = tl.program_id(0) % key_tiles, tl.program_id(0) // key_tiles
    batch = head // heads
    j = key_tile * KEYS + tl.arange(0, KEYS)
    k += batch.to(tl.int64) * k_batch + tl.load(kv_head_of + head % heads).to(tl.int64) * k_head
    k_tile = load_tile(k, j, k_key, keys, dim, DIM)
    key_at, key_in = key_codes(key_position, key_document, batch, j, keys, GIVEN)
    q += head.to(tl.int64) * rows * dim
    weight += batch.to(tl.int64) * rows
    start, stop = split * steps, tl.minimum(split * steps + steps, tl.cdiv(rows, ROWS))
    if BOUNDED:
        start = tl.maximum(start, tl.load(first + batch * key_tiles + key_tile))
    received = tl.zeros([KEYS, ROWS], ACC)
    best = tl.full([KEYS, ROWS], -1, tl.int32)
    for tile in range(start, stop):
        i = tile * ROWS + tl.arange(0, ROWS)
        q_tile = load_tile(q, i, dim, rows, dim, DIM)
        row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, GIVEN)
        row_lse, w = load_lse(lse, head, i, rows)[None, :], tl.load(weight + i, mask=i < rows, other=0.0)[None, :]
        scores = dot(k_tile, tl.trans(q_tile), ACC)
        p = probability(
            scores, row_lse, row_at[None, :], row_in[None, :], key_at[:, None], key_in[:, None], scale, CAUSAL
        )
        if REDUCE == "sum":
            received += w * p
        elif REDUCE == "sumsq":
            received += w * p * p
        else:
            p = tl.where(w > 0, p, 0.0)
            if PLACE:
                best = tl.where(p > received, i[None, :], best)
            received = tl.maximum(received, p)
    at = (split * (tl.num_programs(0) // key_tiles) + head).to(tl.int64) * keys + j
    result = tl.max(received, 1) if REDUCE == "max" else tl.sum(received, 1)
    tl.store(out + at, result, mask=j < keys)
    if PLACE:  # the first of equals: each column of the tile already has its first
        best = tl.min(tl.where(received == tl.expand_dims(result, 1), best, 2147483647), 1)
        tl.store(place + at, best, mask=j < keys)
