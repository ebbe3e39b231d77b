"""What our Triton kernels share: how a tile is loaded, who sees whom inside it, and how large tiles are.

Rules for every kernel: powers of two of base 2 inside (``exp2``; scores carry ``scale * log2 e``), natural logs at
the API; offsets in int64; lengths not specialised; no atomics, so results are deterministic; the accumulator type is
a parameter, so the same kernel runs in fp64 under the interpreter; no autotuning is needed for correctness.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm.kernels.dispatch import interpreting
from vlm.kernels.visibility import Operands

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps and pipeline stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(dim: int, dtype: torch.dtype, accumulators: int = 1) -> Tiles:
    """Tile sizes for a head dim and the number of [rows, dim] accumulators held in registers.

    ``dim`` counts after padding to a power of two. Small tiles under the interpreter, where every step costs the
    same whatever its size but tests want lengths that cross tile borders.
    """
    if interpreting():
        return Tiles(16, 16, 4, 1)
    wide = dtype == torch.float32
    if dim <= 64:
        return Tiles(128 if accumulators == 1 else 64, 64, 4, 2 if wide else 3)
    if dim <= 128:
        rows = 128 if accumulators == 1 and not wide else 64
        return Tiles(rows, 32 if wide else 64, 8 if rows == 128 else 4, 2)
    return Tiles(64 if accumulators == 1 and not wide else 32, 32, 4 if wide else 8, 2)


def padded(dim: int) -> int:
    """The head dim a tile is loaded with: the next power of two, at least 16 (what ``tl.dot`` takes)."""
    return max(16, triton.next_power_of_2(dim))


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton type of scores and sums: fp64 for fp64 inputs, else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dimension, copied only if it is otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the GPU of ``x``: Triton takes the current one, wherever its arguments lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def codes_of(x: Operands) -> tuple[bool, Tensor, Tensor, Tensor, Tensor]:
    """(by index, row position, key position, row document, key document) for a launch.

    By index the kernel derives all four from its indices and never reads the tensors, which are then empty.
    """
    if x.seen.by_index:
        none = torch.empty(0, dtype=torch.int32, device=x.q.device)
        return True, none, none, none, none
    return False, *x.seen.codes(x.q.shape[0])


@triton.jit
def load_tile(base, index, stride, length, dim, DIM: tl.constexpr):
    """[len(index), DIM] of a [length, dim] matrix; zeros outside."""
    d = tl.arange(0, DIM)
    inside = (index[:, None] < length) & (d[None, :] < dim)
    return tl.load(base + index.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, index, stride, length, dim, value, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    inside = (index[:, None] < length) & (d[None, :] < dim)
    tl.store(base + index.to(tl.int64)[:, None] * stride + d[None, :], value, mask=inside)


@triton.jit
def row_codes(position, document, batch, i, rows, keys, BY_INDEX: tl.constexpr):
    """(position, document) of rows i of one sample; a row outside has document -2, which no key has."""
    if BY_INDEX:
        return i + (keys - rows), tl.where(i < rows, 0, -2)
    at = batch.to(tl.int64) * rows + i
    inside = i < rows
    return tl.load(position + at, mask=inside, other=0), tl.load(document + at, mask=inside, other=-2)


@triton.jit
def key_codes(position, document, batch, j, keys, BY_INDEX: tl.constexpr):
    """(position, document) of keys j of one sample; a key outside has document -1, which no row has."""
    if BY_INDEX:
        return j, tl.where(j < keys, 0, -1)
    at = batch.to(tl.int64) * keys + j
    inside = j < keys
    return tl.load(position + at, mask=inside, other=0), tl.load(document + at, mask=inside, other=-1)


@triton.jit
def sees(row_position, row_document, key_position, key_document, CAUSAL: tl.constexpr):
    """[rows, keys] bool: the rule of :class:`~vlm.kernels.visibility.Visibility` inside a tile."""
    same = row_document[:, None] == key_document[None, :]
    if CAUSAL:
        same = same & (key_position[None, :] <= row_position[:, None])
    return same


@triton.jit
def dot(a, b, ACC: tl.constexpr):
    """a b with sums in ACC; fp32 inputs are multiplied as such (never as tf32)."""
    return tl.dot(a, b, out_dtype=ACC, input_precision="ieee")
