"""FlexAttention, compiled on a GPU and plain on a CPU, with the log-sum-exp and the mask of our operations.

Checked on a CPU only: in fp64 against the references, and once compiled, where the block lists of ``mask_of`` are read
(6e-7 in fp32). Nothing of it has run on a GPU, its backward included.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex_module
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from vlm.kernels.visibility import Operands, Visibility

TILE = 128  # rows and keys of a block of a block mask
UNTRACED = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"  # PyTorch's own switch, without a public name

# Of a score (score, batch, head, row, key) or a mask (batch, head, row, key). Write them as lambdas: the shape check of
# the tests wraps a def, and FlexAttention neither counts the arguments of what is wrapped nor compiles it.
Modifier = Callable[..., Tensor]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=None)


def _uncompiled(*args: Any, **kwargs: Any) -> Any:
    """Without the trace that FlexAttention makes on every call from outside a compiled function.

    Traces cost tenths of a second each, and after a few with other lengths or functions PyTorch refuses more.
    """
    before = getattr(flex_module, UNTRACED, False)
    setattr(flex_module, UNTRACED, True)
    try:
        return flex_attention(*args, **kwargs)
    finally:
        setattr(flex_module, UNTRACED, before)


def flex(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    score_mod: Modifier | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch heads rows value_dim"], Float[Tensor, "batch heads rows"]]:
    """``(out, natural log-sum-exp)``. Query heads are a multiple of key heads. A row that sees nothing: 0, -inf."""
    if not q.shape[2] or not k.shape[2]:  # FlexAttention takes no empty side
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    call = _compiled() if q.is_cuda else _uncompiled
    grouped = q.shape[1] != k.shape[1]
    out, aux = call(q, k, v, score_mod, block_mask, scale, grouped, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def mask_of(
    seen: Visibility, batch: int, member: Bool[Tensor, "batch one_or_heads keys"] | None = None
) -> BlockMask | None:
    """The block mask of a visibility, None where every row sees every key; ``member`` keeps some of the keys only.

    Which tiles hold a visible pair is worked out from the range of positions and documents in each tile of rows and of
    keys: tiles x tiles of memory, nothing to compile, no look at values. A tile that only may hold one is listed as
    partial, and the mask function decides inside it (and everywhere on a CPU, where uncompiled FlexAttention does not
    read the lists).
    """
    if seen.by_index and not seen.causal and member is None:
        return None
    some, every = _tiles(seen, batch if member is not None or not seen.by_index else 1)
    mask_mod = seen.mask_mod(batch)
    if member is not None:
        some = some & _tiled(member, False).any(-1)[:, :, None]
        every = every & _tiled(member, False).all(-1)[:, :, None]
        mask_mod = _and_member(mask_mod, member)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(seen.rows, seen.keys)
    )


def block_mask(mask_mod: Modifier, batch: int | None, seen: Visibility) -> BlockMask:
    """A block mask for any mask function that does not depend on the head; on CUDA it is compiled, for each shape."""
    on_gpu = seen.device.type == "cuda"
    return create_block_mask(mask_mod, batch, None, seen.rows, seen.keys, device=seen.device, _compile=on_gpu)


def grouped_heads(x: Operands) -> tuple[Tensor, Tensor]:
    """Keys and values as FlexAttention takes them: expanded only when the head map is not the even one."""
    assert x.v is not None
    if x.kv_head_of is None:
        return x.k, x.v
    return x.per_head(x.k), x.per_head(x.v)


class _Ranges:
    """Lowest and highest position and document of the visible elements of each tile, and whether all are visible."""

    def __init__(self, position: Int[Tensor, "batch length"], document: Int[Tensor, "batch length"]) -> None:
        lowest, highest = torch.iinfo(position.dtype).min, torch.iinfo(position.dtype).max
        there = _tiled(document >= 0, False)  # [B,tiles,TILE]
        tiled = [_tiled(x, 0) for x in (position, document)]
        self.low = [x.masked_fill(~there, highest).amin(-1) for x in tiled]
        self.high = [x.masked_fill(~there, lowest).amax(-1) for x in tiled]
        self.any, self.all = there.any(-1), there.all(-1)
        self.one_document = self.low[1] == self.high[1]


def _tiles(
    seen: Visibility, batch: int
) -> tuple[Bool[Tensor, "batch 1 row_tiles key_tiles"], Bool[Tensor, "batch 1 row_tiles key_tiles"]]:
    """(tiles where a row may see a key, tiles where every row sees every key)."""
    row_position, key_position, row_document, key_document = seen.codes(batch)
    rows, keys = _Ranges(row_position, row_document), _Ranges(key_position, key_document)
    pair = lambda compare, x, y: compare(x[:, :, None], y[:, None, :])  # noqa: E731
    some = pair(torch.logical_and, rows.any, keys.any)
    some &= pair(torch.le, rows.low[1], keys.high[1]) & pair(torch.ge, rows.high[1], keys.low[1])
    every = pair(torch.logical_and, rows.all & rows.one_document, keys.all & keys.one_document)
    every &= pair(torch.eq, rows.low[1], keys.low[1])
    if seen.causal:
        some &= pair(torch.ge, rows.high[0], keys.low[0])
        every &= pair(torch.ge, rows.low[0], keys.high[0])
    return some[:, None], every[:, None]


def _tiled(x: Tensor, fill: int | bool) -> Tensor:
    """[..., length] in tiles, the last one filled up: [..., tiles, TILE]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE), value=fill).unflatten(-1, (-1, TILE))


def _listed(tiles: Bool[Tensor, "batch one_or_heads row_tiles key_tiles"]) -> tuple[Tensor, Tensor]:
    """For every tile of rows the number of its key tiles and their indices, the unused ones behind them."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _and_member(mask_mod: Modifier, member: Bool[Tensor, "batch one_or_heads keys"]) -> Modifier:
    if member.shape[1] == 1:
        of_all = member[:, 0]
        return lambda b, h, i, j: mask_mod(b, h, i, j) & of_all[b, j]
    return lambda b, h, i, j: mask_mod(b, h, i, j) & member[b, h, j]
