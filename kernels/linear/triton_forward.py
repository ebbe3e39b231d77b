"""Causal linear attention in Triton, forward: one kernel for the states between chunks, one for the rows.

The state kernel walks over the chunks of a head and writes the state before each of them; a program owns one tile of
the state. The row kernel then takes all chunks at once: scores inside the chunk, the rest through its state. (Lightning
Attention 2, Qin et al., 2024; the split into two kernels as in flash-linear-attention.)

Decays come as ``level``, the log-decays summed up from the first token of a chunk. A factor is 2^(level - level) of a
later and an earlier token, never above 1. A decay to nothing has no finite level: ``resets`` counts those in the chunk,
and tokens with different counts know nothing of each other.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels.dispatch import interpreting
from vlm.kernels.tile import accumulator, dot, load_tile, on_device, padded, store_tile

State = Float[Tensor, "batch kv_heads features value_dim"]
States = Float[Tensor, "batch kv_heads chunks_and_one features value_dim"]  # before every chunk and after the last


@dataclass(frozen=True)
class Chunks:
    """What the kernels work on. q, k and v are of one type with stride 1 in their last dimension."""

    q: Float[Tensor, "batch heads length features"]
    k: Float[Tensor, "batch kv_heads length features"]
    v: Float[Tensor, "batch kv_heads length value_dim"]
    level: Float[Tensor, "batch kv_heads whole_chunks"] | None  # of base 2; None: no decay
    resets: Int[Tensor, "batch kv_heads whole_chunks"] | None
    scale: float
    chunk: int

    @property
    def count(self) -> int:
        return triton.cdiv(self.k.shape[2], self.chunk)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.k.dtype, torch.float32)

    def tiles(self) -> tuple[int, int]:
        """Features and values of a tile. Small under the interpreter, so that tests cross tile borders.

        Larger ones do not fit the registers (compiled for sm_90); in fp32 they also take a minute to compile.
        """
        small = self.k.dtype == torch.float32 or self.chunk == 128
        most = 16 if interpreting() else 32 if small else 64
        return min(most, padded(self.k.shape[3])), min(most, padded(self.v.shape[3]))

    def launch(self, kernel: Any, tiled: str, heads: int, *arguments: Any, **constants: Any) -> None:
        """Run a kernel for each head of each sample, and each chunk and each tile of what ``tiled`` names."""
        features, values = self.tiles()
        count = {
            "chunks": self.count,
            "features": triton.cdiv(self.k.shape[3], features),
            "values": triton.cdiv(self.v.shape[3], values),
        }
        first, second = tiled.split()
        grid = (self.k.shape[0] * heads, count[first], count[second])
        kv_heads, length, dim = self.k.shape[1:]
        sizes = (kv_heads, self.q.shape[1] // kv_heads, length, dim, self.v.shape[3], self.count)
        with on_device(self.k):
            kernel[grid](*arguments, self.level, self.resets, self.scale, *sizes, **constants, **self.settings())

    def new_states(self) -> States:
        """Memory for a state before every chunk and one after the last."""
        shape = (*self.k.shape[:2], 1 + self.count, self.k.shape[3], self.v.shape[3])
        return torch.empty(shape, dtype=self.accumulator, device=self.k.device)

    def settings(self) -> dict[str, Any]:
        """The constants that every kernel takes."""
        feature_tile, value_tile = self.tiles()
        wide = self.k.dtype in (torch.float16, torch.float32)
        return {
            "DECAY": self.level is not None,
            "CHUNK": self.chunk,
            "FEATURES": feature_tile,
            "VALUES": value_tile,
            "ACC": accumulator(self.k.dtype),
            # a sum over thousands of tokens may exceed the largest number of fp16
            "STATE": tl.float32 if wide else tl.bfloat16 if self.k.dtype == torch.bfloat16 else tl.float64,
            "num_warps": 8 if self.chunk >= 64 else 4,
            "num_stages": 1 if self.k.dtype == torch.float32 else 2,
        }


def levels(
    log_decay: Float[Tensor, "batch kv_heads length"], chunk: int
) -> tuple[Float[Tensor, "batch kv_heads whole_chunks"], Int[Tensor, "batch kv_heads whole_chunks"]]:
    """Natural log-decays summed up in each chunk, and how many decays to nothing the chunk had so far."""
    count = triton.cdiv(log_decay.shape[2], chunk)
    gone = log_decay.exp() == 0
    summed = []
    for x in (log_decay.masked_fill(gone, 0.0), gone.int()):
        x = F.pad(x, (0, count * chunk - log_decay.shape[2])).unflatten(2, (count, chunk))
        summed.append(x.cumsum(-1, dtype=x.dtype).flatten(2))
    level, resets = summed
    return level, resets


def chunk_states(x: Chunks, initial: State | None) -> States:
    """The state before every chunk and after the last one, in fp32 (fp64)."""
    states = x.new_states()
    states[:, :, 0] = 0.0 if initial is None else initial
    strides = (x.k.stride()[:3], x.v.stride()[:3])
    x.launch(state_kernel, "features values", x.k.shape[1], x.k, x.v, states, *strides)
    return states


def chunk_rows(
    x: Chunks, states: Float[Tensor, "batch kv_heads chunks_and_one _ _"], dtype: torch.dtype, turned: bool = False
) -> Float[Tensor, "batch heads length value_dim"]:
    """The output from the states before every chunk, which are ``turned`` if they are [value_dim, features]."""
    out = torch.empty(*x.q.shape[:3], x.v.shape[3], dtype=dtype, device=x.q.device)
    strides = (x.q.stride()[:3], x.k.stride()[:3], x.v.stride()[:3])
    x.launch(row_kernel, "chunks values", x.q.shape[1], x.q, x.k, x.v, states, out, *strides, TURNED=turned)
    return out


@triton.jit
def at_head(base, strides, head, heads):
    """The matrix of one head; ``head`` counts over the heads of all samples."""
    return base + (head // heads) * strides[0] + (head % heads) * strides[1]


@triton.jit
def decays(level, resets, head, chunk, chunks, CHUNK: tl.constexpr):
    """Of a chunk: (level, resets) of each token, then what is left at a token of the state before the chunk, at the
    end of the chunk of a token, and at the end of the chunk of the state before it."""
    start = (head * chunks + chunk) * CHUNK
    t = tl.arange(0, CHUNK)
    token_level, token_resets = tl.load(level + start + t), tl.load(resets + start + t)
    end_level, end_resets = tl.load(level + start + CHUNK - 1), tl.load(resets + start + CHUNK - 1)
    from_start = tl.where(token_resets == 0, tl.exp2(token_level), 0.0)
    to_end = tl.where(token_resets == end_resets, tl.exp2(end_level - token_level), 0.0)
    whole = tl.where(end_resets == 0, tl.exp2(end_level), 0.0)
    return token_level, token_resets, from_start, to_end, whole


@triton.jit
def pair_weights(level, resets, DECAY: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """[rows, keys] of a chunk: what is left of a key at a row; 0 for a later key."""
    t = tl.arange(0, CHUNK)
    seen = t[:, None] >= t[None, :]
    if DECAY:
        seen = seen & (resets[:, None] == resets[None, :])
        difference = tl.where(seen, level[:, None] - level[None, :], 0.0)
        return tl.where(seen, tl.exp2(difference), 0.0)
    return tl.where(seen, 1.0, 0.0).to(ACC)


@triton.jit
def decayed(tile, factor):
    """A tile whose rows are multiplied by a factor each, in the type it has."""
    return (tile * factor[:, None]).to(tile.dtype)


@triton.jit
def dot_state(a, b, ACC: tl.constexpr, STATE: tl.constexpr):
    """A product with a state or a state's gradient."""
    return dot(a.to(STATE), b.to(STATE), ACC)


@triton.jit(do_not_specialize=["length", "chunks"])
def state_kernel(
    k, v, states, k_strides, v_strides, level, resets, scale, heads, group, length, features, values, chunks,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ACC: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One tile of the state of one key head, all chunks in order; place 0 of ``states`` is given."""
    head = tl.program_id(0).to(tl.int64)
    f, e = tl.program_id(1) * FEATURES, tl.program_id(2) * VALUES
    k, v = at_head(k, k_strides, head, heads) + f, at_head(v, v_strides, head, heads) + e
    states += head * (chunks + 1) * features * values + f * values + e
    row = tl.arange(0, FEATURES)
    state = load_tile(states, row, values, features - f, values - e, VALUES)
    for chunk in range(0, chunks):
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        k_tile = load_tile(k, t, k_strides[2], length, features - f, FEATURES)
        v_tile = load_tile(v, t, v_strides[2], length, values - e, VALUES)
        if DECAY:
            _, _, _, to_end, whole = decays(level, resets, head, chunk, chunks, CHUNK)
            k_tile = decayed(k_tile, to_end)
            state = state * whole
        state += dot(tl.trans(k_tile), v_tile, ACC)
        states += features * values
        store_tile(states, row, values, features - f, values - e, state, VALUES)


@triton.jit
def load_state(
    states, f, e, features, values, TURNED: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr
):  # fmt: skip
    """A [FEATURES, VALUES] tile of a state of [features, values], or if TURNED of one of [values, features]."""
    if TURNED:
        tile = load_tile(states + f, e + tl.arange(0, VALUES), features, values, features - f, FEATURES)
        return tl.trans(tile)
    return load_tile(states + e, f + tl.arange(0, FEATURES), values, features, values - e, VALUES)


@triton.jit(do_not_specialize=["length", "chunks"])
def row_kernel(
    q, k, v, states, out, q_strides, k_strides, v_strides, level, resets, scale,
    heads, group, length, features, values, chunks,
    TURNED: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ACC: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The rows of one chunk and one query head, one tile of values."""
    row_head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.program_id(2) * VALUES
    head = row_head // group  # query heads of a key head lie side by side
    q, k = at_head(q, q_strides, row_head, heads * group), at_head(k, k_strides, head, heads)
    v = at_head(v, v_strides, head, heads) + e
    states += (head * (chunks + 1) + chunk) * features * values
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    scores, rows = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, VALUES], ACC)
    for f in range(0, features, FEATURES):
        q_tile = load_tile(q + f, t, q_strides[2], length, features - f, FEATURES)
        k_tile = load_tile(k + f, t, k_strides[2], length, features - f, FEATURES)
        state = load_state(states, f, e, features, values, TURNED, FEATURES, VALUES)
        scores += dot(q_tile, tl.trans(k_tile), ACC)
        rows += dot_state(q_tile, state, ACC, STATE)
    token_level, token_resets = t, t
    if DECAY:
        token_level, token_resets, from_start, _, _ = decays(level, resets, head, chunk, chunks, CHUNK)
        rows = rows * from_start[:, None]
    v_tile = load_tile(v, t, v_strides[2], length, values - e, VALUES)
    weights = pair_weights(token_level, token_resets, DECAY, CHUNK, ACC)
    rows += dot((scores * weights).to(v_tile.dtype), v_tile, ACC)
    store_tile(out + row_head * length * values + e, t, values, length, values - e, rows * scale, VALUES)
