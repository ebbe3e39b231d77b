"""Received attention in Triton with gradients to q, k and lse.

With p the attention of a chosen row and pi = d loss / d p,

    sum:  pi = w[i] g[j]        sumsq:  pi = 2 w[i] p g[j]        max:  pi = g[j] in the row that attains it, else 0

where g is the gradient of what the keys receive. A given lse is an input of its own:

    d loss / d score = p pi             d loss / d lse[i] = -(sum over j of p pi)

An lse that is computed here brings the softmax along, and the second term joins the first:

    d loss / d score = p (pi - sum over j of p pi)

(The attention with g as one more value channel whose output has gradient w; derived here.) No float atomics: one
kernel walks over keys for each tile of rows, another over rows for each tile of keys.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.received.triton_forward import (
    GIVEN,
    Chosen,
    Walk,
    add_up,
    column_pass,
    load_lse,
    log_sum_exp,
    probability,
)
from vlm.kernels.tile import dot, key_codes, load_tile, row_codes, store_tile
from vlm.kernels.visibility import Operands


def received_triton(
    x: Operands,
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    reduce: str,
) -> Float[Tensor, "batch heads keys"]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x.q, x.k, lse)):
        return _Received.apply(x.q, x.k, lse, x, rows, row_weight, reduce)
    chosen = Chosen.of(x, rows, row_weight)
    return column_pass(chosen, _of_chosen(lse, chosen, rows), reduce)[0]


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, lse: Tensor | None, x: Operands, rows: Tensor, row_weight: Tensor, reduce: str
    ) -> Tensor:
        chosen = Chosen.of(x, rows, row_weight)
        of_chosen = _of_chosen(lse, chosen, rows)
        received, place = column_pass(chosen, of_chosen, reduce, keep_place=True)
        ctx.save_for_backward(rows, of_chosen, place, *chosen.tensors())
        ctx.rest = chosen.scale, chosen.causal
        ctx.reduce, ctx.q_like, ctx.lse_like = reduce, _like(q), None if lse is None else _like(lse)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, lse, place, *tensors = ctx.saved_tensors
        loss = Loss(Chosen(*tensors, *ctx.rest), lse, grad.contiguous(), place, ctx.reduce)
        for_q, for_k, for_lse = ctx.needs_input_grad[:3]
        given = ctx.lse_like is not None
        total = _row_totals(loss) if for_lse or not given else None
        centre, dim = None if given else total, ctx.q_like[0][3]
        dq = _at_rows(_query_gradient(loss, centre)[..., :dim], rows, ctx.q_like) if for_q else None
        dk = _key_gradient(loss, centre)[..., :dim] if for_k else None
        dlse = _at_rows(-total, rows, ctx.lse_like) if for_lse and total is not None else None
        return dq, dk, dlse, None, None, None, None


class Loss(NamedTuple):
    """What the gradient kernels walk over."""

    chosen: Chosen
    lse: Float[Tensor, "batch heads chosen"]
    grad: Float[Tensor, "batch heads keys"]  # of what the keys receive
    place: Int[Tensor, "batch heads keys"] | None  # for a maximum: the place of the row that attains it
    reduce: str

    def launch(self, kernel: Any, walk: Walk, *arguments: Any, **constants: Any) -> None:
        given = (self.lse, self.chosen.weight, self.grad, self.place)
        self.chosen.launch(kernel, walk, *given, *arguments, REDUCE=self.reduce, **constants)


def _of_chosen(lse: Tensor | None, chosen: Chosen, rows: Tensor) -> Float[Tensor, "batch heads chosen"]:
    if lse is None:
        return log_sum_exp(chosen)
    return lse.to(chosen.accumulator).gather(2, rows.clamp_min(0)[:, None].expand(chosen.q.shape[:3])).contiguous()


def _like(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


def _at_rows(x: Tensor, rows: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """Sums of [batch, heads, chosen, ...] over the places of each row; deterministic, unlike the backward of gather."""
    shape, dtype = like
    out = x.new_zeros(shape)
    batch = torch.arange(len(rows), device=rows.device)[:, None].expand(rows.shape)
    # a place of -1 sees nothing and adds its 0 to row 0
    out.transpose(1, 2).index_put_((batch, rows.clamp_min(0)), x.transpose(1, 2), accumulate=True)
    return out.to(dtype)


def _row_totals(loss: Loss) -> Float[Tensor, "batch heads chosen"]:
    """Sum over keys of p pi."""
    walk = loss.chosen.walk_keys()
    out = loss.chosen.empty(walk.splits, *loss.chosen.q.shape[:3])
    loss.launch(_row_totals_kernel, walk, out)
    return add_up(out)


def _query_gradient(
    loss: Loss, centre: Float[Tensor, "batch heads chosen"] | None
) -> Float[Tensor, "batch heads chosen dim"]:
    walk = loss.chosen.walk_keys(accumulators=2)
    out = loss.chosen.empty(walk.splits, *loss.chosen.q.shape)
    loss.launch(_query_gradient_kernel, walk, centre, out, CENTRED=centre is not None)
    return add_up(out)


def _key_gradient(
    loss: Loss, centre: Float[Tensor, "batch heads chosen"] | None
) -> Float[Tensor, "batch kv_heads keys dim"]:
    chosen, kv_heads = loss.chosen, loss.chosen.k.shape[1]
    walk = chosen.walk_rows(accumulators=2, by_key_head=True)
    out = chosen.empty(walk.splits, *chosen.k.shape)
    # query heads in the order of their key head, and where those of each key head begin
    kv_head, members = chosen.kv_head_of.sort(stable=True)
    begins = torch.searchsorted(kv_head, torch.arange(kv_heads + 1, dtype=torch.int32, device=kv_head.device))
    loss.launch(_key_gradient_kernel, walk, centre, members, begins, out, kv_heads, CENTRED=centre is not None)
    return add_up(out).to(chosen.k.dtype)


@triton.jit
def slope(p, weight, grad, best, place, REDUCE: tl.constexpr):
    """pi of a tile either way round: all but p come shaped to broadcast along it."""
    if REDUCE == "sum":
        pi = weight * grad
    elif REDUCE == "sumsq":
        pi = 2.0 * weight * grad * p
    else:
        pi = tl.where(best == place, grad, 0.0)
    return pi


@triton.jit
def load_keys(grad, place, head, j, keys, REDUCE: tl.constexpr):
    """(gradient, place of the row that attains the maximum) of keys j."""
    at = head.to(tl.int64) * keys + j
    best = j
    if REDUCE == "max":
        best = tl.load(place + at, mask=j < keys, other=-1)
    return tl.load(grad + at, mask=j < keys, other=0.0), best


@triton.jit(do_not_specialize=["heads", "rows", "keys", "steps"])
def _row_totals_kernel(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, steps, end, lse, weight, grad, place, out,
    REDUCE: tl.constexpr, BOUNDED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head of one sample (``head`` counts over both), some of the keys."""
    row_tiles, split = tl.cdiv(rows, ROWS), tl.program_id(1)
    row_tile, head = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    batch = head // heads
    i = row_tile * ROWS + tl.arange(0, ROWS)
    q_tile = load_tile(q + head.to(tl.int64) * rows * dim, i, dim, rows, dim, DIM)
    row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, GIVEN)
    row_lse = load_lse(lse, head, i, rows)[:, None]
    w = tl.load(weight + batch.to(tl.int64) * rows + i, mask=i < rows, other=0.0)[:, None]
    k += batch.to(tl.int64) * k_batch + tl.load(kv_head_of + head % heads).to(tl.int64) * k_head
    stop = tl.minimum(split * steps + steps, tl.cdiv(keys, KEYS))
    if BOUNDED:
        stop = tl.minimum(stop, tl.load(end + batch * row_tiles + row_tile))
    total = tl.zeros([ROWS], ACC)
    for tile in range(split * steps, stop):
        j = tile * KEYS + tl.arange(0, KEYS)
        key_at, key_in = key_codes(key_position, key_document, batch, j, keys, GIVEN)
        scores = dot(q_tile, tl.trans(load_tile(k, j, k_key, keys, dim, DIM)), ACC)
        p = probability(
            scores, row_lse, row_at[:, None], row_in[:, None], key_at[None, :], key_in[None, :], scale, CAUSAL
        )
        g, best = load_keys(grad, place, head, j, keys, REDUCE)
        total += tl.sum(p * slope(p, w, g[None, :], best[None, :], i[:, None], REDUCE), 1)
    at = (split * (tl.num_programs(0) // row_tiles) + head).to(tl.int64) * rows + i
    tl.store(out + at, total, mask=i < rows)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "steps"])
def _query_gradient_kernel(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, steps, end, lse, weight, grad, place, centre, out,
    REDUCE: tl.constexpr, CENTRED: tl.constexpr, BOUNDED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head of one sample (``head`` counts over both), some of the keys."""
    row_tiles, split = tl.cdiv(rows, ROWS), tl.program_id(1)
    row_tile, head = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    batch = head // heads
    i = row_tile * ROWS + tl.arange(0, ROWS)
    at = head.to(tl.int64) * rows
    q_tile = load_tile(q + at * dim, i, dim, rows, dim, DIM)
    row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, GIVEN)
    row_lse = load_lse(lse, head, i, rows)[:, None]
    w = tl.load(weight + batch.to(tl.int64) * rows + i, mask=i < rows, other=0.0)[:, None]
    k += batch.to(tl.int64) * k_batch + tl.load(kv_head_of + head % heads).to(tl.int64) * k_head
    stop = tl.minimum(split * steps + steps, tl.cdiv(keys, KEYS))
    if BOUNDED:
        stop = tl.minimum(stop, tl.load(end + batch * row_tiles + row_tile))
    gradient = tl.zeros([ROWS, DIM], ACC)
    for tile in range(split * steps, stop):
        j = tile * KEYS + tl.arange(0, KEYS)
        k_tile = load_tile(k, j, k_key, keys, dim, DIM)
        key_at, key_in = key_codes(key_position, key_document, batch, j, keys, GIVEN)
        scores = dot(q_tile, tl.trans(k_tile), ACC)
        p = probability(
            scores, row_lse, row_at[:, None], row_in[:, None], key_at[None, :], key_in[None, :], scale, CAUSAL
        )
        g, best = load_keys(grad, place, head, j, keys, REDUCE)
        pi = slope(p, w, g[None, :], best[None, :], i[:, None], REDUCE)
        if CENTRED:
            pi -= tl.load(centre + at + i, mask=i < rows, other=0.0)[:, None]
        gradient += dot((p * pi).to(k_tile.dtype), k_tile, ACC)
    out += ((split * (tl.num_programs(0) // row_tiles)).to(tl.int64) * rows + at) * dim
    store_tile(out, i, dim, rows, dim, gradient * scale, DIM)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "steps", "kv_heads"])
def _key_gradient_kernel(
    q, k, kv_head_of, row_position, key_position, row_document, key_document,
    heads, rows, keys, dim, k_batch, k_head, k_key, scale, steps, first, lse, weight, grad, place, centre,
    members, begins, out, kv_heads,
    REDUCE: tl.constexpr, CENTRED: tl.constexpr, BOUNDED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of keys, one key head of one sample, some of the rows of all its query heads."""
    key_tiles, split = tl.cdiv(keys, KEYS), tl.program_id(1)
    key_tile, both = tl.program_id(0) % key_tiles, tl.program_id(0) // key_tiles
    batch, kv = both // kv_heads, both % kv_heads
    j = key_tile * KEYS + tl.arange(0, KEYS)
    k_tile = load_tile(k + batch.to(tl.int64) * k_batch + kv.to(tl.int64) * k_head, j, k_key, keys, dim, DIM)
    key_at, key_in = key_codes(key_position, key_document, batch, j, keys, GIVEN)
    start, stop = split * steps, tl.minimum(split * steps + steps, tl.cdiv(rows, ROWS))
    if BOUNDED:
        start = tl.maximum(start, tl.load(first + batch * key_tiles + key_tile))
    gradient = tl.zeros([KEYS, DIM], ACC)
    for member in range(tl.load(begins + kv), tl.load(begins + kv + 1)):
        head = batch * heads + tl.load(members + member).to(tl.int32)
        at = head.to(tl.int64) * rows
        g, best = load_keys(grad, place, head, j, keys, REDUCE)
        for tile in range(start, stop):
            i = tile * ROWS + tl.arange(0, ROWS)
            q_tile = load_tile(q + at * dim, i, dim, rows, dim, DIM)
            row_at, row_in = row_codes(row_position, row_document, batch, i, rows, keys, GIVEN)
            row_lse = load_lse(lse, head, i, rows)[None, :]
            w = tl.load(weight + batch.to(tl.int64) * rows + i, mask=i < rows, other=0.0)[None, :]
            scores = dot(k_tile, tl.trans(q_tile), ACC)
            p = probability(
                scores, row_lse, row_at[None, :], row_in[None, :], key_at[:, None], key_in[:, None], scale, CAUSAL
            )
            pi = slope(p, w, g[:, None], best[:, None], i[None, :], REDUCE)
            if CENTRED:
                pi -= tl.load(centre + at + i, mask=i < rows, other=0.0)[None, :]
            gradient += dot((p * pi).to(q_tile.dtype), q_tile, ACC)
    out += (split * (tl.num_programs(0) // key_tiles) + both).to(tl.int64) * keys * dim
    store_tile(out, j, dim, keys, dim, gradient * scale, DIM)
