"""Received attention in Triton, forward: the column pass, and the log-sum-exp of the chosen rows when none is given.

The chosen rows are gathered once. A program of the column pass keeps one tile of keys, walks over the rows and adds
up p per (key, row of the tile), so that it reduces over rows once, at its end. Long walks are split over programs
whose partial results torch adds up. One pass over K for the column pass, one for the log-sum-exp.
"""

from dataclasses import dataclass
from typing import Any

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
    padded,
    row_codes,
    sees,
    tiles,
    unit_stride,
)
from vlm.kernels.visibility import Operands

PROCESSORS_INTERPRETED = 4  # stands for a GPU's, so that tests meet walks that are split and walks that are not


@dataclass(frozen=True)
class Chosen:
    """The chosen rows beside the keys, as every kernel here takes them."""

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
        codes = x.seen.pick(rows).codes(batch)
        return Chosen(q, unit_stride(x.k), row_weight.contiguous(), *codes, x.head_map(), x.scale, x.seen.causal)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are tensors, in their order."""
        codes = (self.row_position, self.key_position, self.row_document, self.key_document)
        return (self.q, self.k, self.weight, *codes, self.kv_head_of)

    @property
    def accumulator(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def heads(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    def tiles(self, accumulators: int = 1, keys_stay: bool = False) -> Tiles:
        """Tile sizes; the larger side is the one that a program keeps."""
        t = tiles(padded(self.q.shape[3]), self.q.dtype, accumulators)
        rows, keys = (t.keys, t.rows) if keys_stay else (t.rows, t.keys)
        few = max(16, triton.next_power_of_2(self.q.shape[2]))
        return t._replace(rows=min(rows, few), keys=keys)

    def inputs(self) -> tuple[Any, ...]:
        """The arguments that every kernel begins with."""
        codes = (self.row_position, self.key_position, self.row_document, self.key_document)
        sizes = (self.q.shape[1], self.q.shape[2], self.k.shape[2], self.q.shape[3])
        return (self.q, self.k, self.kv_head_of, *codes, *sizes, *self.k.stride()[:3], self.scale)

    def constants(self, t: Tiles) -> dict[str, Any]:
        """The constants that every kernel takes."""
        return {
            "CAUSAL": self.causal,
            "ROWS": t.rows,
            "KEYS": t.keys,
            "DIM": padded(self.q.shape[3]),
            "ACC": accumulator(self.q.dtype),
            "num_warps": t.warps,
            "num_stages": t.stages,
        }

    def first_row_tile(self, t: Tiles) -> Int[Tensor, "batch key_tiles"] | None:
        """The first tile of rows that may see something of each tile of keys; None where nothing can be skipped."""
        if not self.causal or self.q.shape[2] <= t.rows:
            return None
        least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
        latest = _by_tile(self.row_position, t.rows, least).amax(2).cummax(1).values  # [B,row tiles]
        earliest = _by_tile(self.key_position, t.keys, most).amin(2)  # [B,key tiles]
        return torch.searchsorted(latest, earliest, out_int32=True)

    def end_of_keys(self, t: Tiles) -> Int[Tensor, "batch row_tiles"] | None:
        """The first tile of keys from which on a tile of rows sees nothing; None where nothing can be skipped."""
        if not self.causal or self.k.shape[2] <= t.keys:
            return None
        least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
        latest = _by_tile(self.row_position, t.rows, least).amax(2)  # [B,row tiles]
        earliest = _by_tile(self.key_position, t.keys, most).amin(2)  # [B,key tiles]
        after = earliest.flip(1).cummin(1).values.flip(1).contiguous()  # earliest of this tile and all later ones
        return torch.searchsorted(after, latest, right=True, out_int32=True)

    def split(self, programs: int, steps: int) -> tuple[int, int]:
        """``(splits, steps of each)`` of a walk, so that the device has enough programs."""
        device, processors = self.q.device, PROCESSORS_INTERPRETED
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        each = triton.cdiv(steps, max(1, min(steps, 2 * processors // max(1, programs))))
        return max(1, triton.cdiv(steps, max(1, each))), each


def log_sum_exp(chosen: Chosen) -> Float[Tensor, "batch heads chosen"]:
    """Natural log-sum-exp of the chosen rows, -inf for one that sees nothing."""
    t = chosen.tiles()
    row_tiles, key_tiles = triton.cdiv(chosen.q.shape[2], t.rows), triton.cdiv(chosen.k.shape[2], t.keys)
    splits, steps = chosen.split(row_tiles * chosen.heads, key_tiles)
    out = torch.empty(splits, *chosen.q.shape[:3], dtype=chosen.accumulator, device=chosen.q.device)
    end = chosen.end_of_keys(t)
    launch(
        _log_sum_exp,
        (row_tiles, chosen.heads, splits),
        *chosen.inputs(),
        end,
        out,
        steps,
        BOUNDED=end is not None,
        **chosen.constants(t),
    )
    return out.logsumexp(0) if splits > 1 else out[0]


def column_pass(
    chosen: Chosen, lse: Float[Tensor, "batch heads chosen"], reduce: str, keep_place: bool = False
) -> tuple[Float[Tensor, "batch heads keys"], Int[Tensor, "batch heads keys"] | None]:
    """What each key receives; with ``keep_place`` and a maximum also which of the chosen rows it is, -1 for none."""
    keep_place = keep_place and reduce == "max"
    t = chosen.tiles(accumulators=2 if reduce == "max" else 1, keys_stay=True)
    row_tiles, key_tiles = triton.cdiv(chosen.q.shape[2], t.rows), triton.cdiv(chosen.k.shape[2], t.keys)
    splits, steps = chosen.split(key_tiles * chosen.heads, row_tiles)
    shape = (splits, *chosen.q.shape[:2], chosen.k.shape[2])
    out = torch.empty(shape, dtype=chosen.accumulator, device=chosen.q.device)
    place = torch.empty(shape, dtype=torch.int32, device=chosen.q.device) if keep_place else None
    first = chosen.first_row_tile(t)
    launch(
        _column_pass,
        (key_tiles, chosen.heads, splits),
        *chosen.inputs(),
        lse.contiguous(),
        chosen.weight,
        first,
        out,
        place,
        steps,
        REDUCE=reduce,
        PLACE=keep_place,
        BOUNDED=first is not None,
        **chosen.constants(t),
    )
    if splits == 1:
        return out[0], None if place is None else place[0]
    if reduce != "max":
        return out.sum(0), None
    best = out.argmax(0, keepdim=True)  # the first of equals
    return out.gather(0, best)[0], None if place is None else place.gather(0, best)[0]


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
    """Run a kernel over a grid that may be empty; an argument of None is a pointer that the kernel never reads."""
    if 0 not in grid:
        kernel[grid](*arguments, **constants)


def _by_tile(position: Int[Tensor, "batch length"], tile: int, fill: int) -> Int[Tensor, "batch tiles tile"]:
    short = -position.shape[1] % tile
    return torch.nn.functional.pad(position, (0, short), value=fill).unflatten(1, (-1, tile))


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
def _log_sum_exp(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, end, out, steps,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head of one sample (``head`` counts over both), some of the keys."""
    row_tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = head // heads
    i = row_tile * ROWS + tl.arange(0, ROWS)
    q_tile = load_tile(q + head.to(tl.int64) * rows * dim, i, dim, rows, dim, DIM)
    row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, False)
    k += batch.to(tl.int64) * k_batch + tl.load(kv_head_of + head % heads).to(tl.int64) * k_head
    stop = tl.minimum(split * steps + steps, tl.cdiv(keys, KEYS))
    if BOUNDED:
        stop = tl.minimum(stop, tl.load(end + batch * tl.num_programs(0) + row_tile))
    most = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    for tile in range(split * steps, stop):
        j = tile * KEYS + tl.arange(0, KEYS)
        k_tile = load_tile(k, j, k_key, keys, dim, DIM)
        key_at, key_in = key_codes(key_position, key_document, batch, j, keys, False)
        scores = dot(q_tile, tl.trans(k_tile), ACC) * (scale * LOG2E)
        scores = tl.where(sees(row_at, row_in, key_at, key_in, CAUSAL), scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
        most = new
    value = (most + tl.log2(tl.where(total > 0, total, 1.0))) * LN2
    tl.store(out + (split * tl.num_programs(1) + head).to(tl.int64) * rows + i, value, mask=i < rows)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "steps"])
def _column_pass(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, lse, weight, first, out, place, steps,
    REDUCE: tl.constexpr, PLACE: tl.constexpr, BOUNDED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of keys, one head of one sample (``head`` counts over both), some of the rows."""
    key_tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = head // heads
    j = key_tile * KEYS + tl.arange(0, KEYS)
    k += batch.to(tl.int64) * k_batch + tl.load(kv_head_of + head % heads).to(tl.int64) * k_head
    k_tile = load_tile(k, j, k_key, keys, dim, DIM)
    key_at, key_in = key_codes(key_position, key_document, batch, j, keys, False)
    q += head.to(tl.int64) * rows * dim
    weight += batch.to(tl.int64) * rows
    start, stop = split * steps, tl.minimum(split * steps + steps, tl.cdiv(rows, ROWS))
    if BOUNDED:
        start = tl.maximum(start, tl.load(first + batch * tl.num_programs(0) + key_tile))
    received = tl.zeros([KEYS, ROWS], ACC)
    best = tl.full([KEYS, ROWS], -1, tl.int32)
    for tile in range(start, stop):
        i = tile * ROWS + tl.arange(0, ROWS)
        q_tile = load_tile(q, i, dim, rows, dim, DIM)
        row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, False)
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
    at = (split * tl.num_programs(1) + head).to(tl.int64) * keys + j
    result = tl.max(received, 1) if REDUCE == "max" else tl.sum(received, 1)
    tl.store(out + at, result, mask=j < keys)
    if PLACE:  # the first of equals: each column of the tile already has its first
        best = tl.min(tl.where(received == result[:, None], best, 2147483647), 1)
        tl.store(place + at, best, mask=j < keys)
