"""Causal linear attention in Triton, backward: the chunks in reverse for the states, then all of them at once.

With A the gradients of the scores (dO V^T with the decays of pairs), B the scores with the same decays, S the state
before a chunk and dS the gradient of the state after it, both as in the forward pass decayed to the token:

    dQ = A K + dO S^T        dK = A^T Q + V dS^T        dV = B^T dO + K dS

States are computed again rather than kept. A decay gets, from the level of its token, q . dq - k . dk, and from the
level at the end of the chunk the product of the state there with its gradient.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.linear.scan import Scan
from vlm.kernels.linear.triton_forward import (
    Chunks,
    State,
    States,
    at_head,
    chunk_rows,
    chunk_states,
    decayed,
    decays,
    dot_state,
    levels,
    load_state,
    pair_weights,
)
from vlm.kernels.tile import LOG2E, dot, load_tile, store_tile, unit_stride

ALIGNED = 16  # dims are filled up to a multiple of it: only then rows are loaded in words of 16 bytes


def scan_triton(x: Scan) -> tuple[Float[Tensor, "batch heads length value_dim"], State]:
    """The causal scan with one decay per head or token, or none."""
    features, values = x.k.shape[3], x.v.shape[3]
    more_features, more_values = -features % ALIGNED, -values % ALIGNED
    q, k = (unit_stride(_filled(t.to(x.v.dtype), more_features)) for t in (x.q, x.k))
    v = unit_stride(_filled(x.v, more_values))
    state = x.first_state()
    if more_features or more_values:
        state = F.pad(state, (0, more_values, 0, more_features))
    decay, level, resets = x.decay_and_starts(), None, None
    if decay is not None:
        level, resets = levels(decay[..., 0].expand(k.shape[0], -1, -1), x.chunk)
    out, state = _Scan.apply(q, k, v, level, resets, state, x.scale, x.chunk, x.out_dtype)
    return out[..., :values], state[..., :features, :values]


def _filled(x: Tensor, more: int) -> Tensor:
    return F.pad(x, (0, more)) if more else x


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        level: Tensor | None,
        resets: Tensor | None,
        initial: Tensor,
        scale: float,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, level, resets, initial)
        ctx.scale, ctx.chunk = scale, chunk
        x = _chunks(q, k, v, level, resets, scale, chunk)
        states = chunk_states(x, initial)
        return chunk_rows(x, states, dtype), states[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable hides the names)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad, grad_final = grads
        q, k, v, level, resets, initial = ctx.saved_tensors
        x = _chunks(q, k, v, level, resets, ctx.scale, ctx.chunk)
        grad = unit_stride(grad.to(v.dtype))
        states = chunk_states(x, initial)
        grad_states = _grad_states(x, grad, grad_final)
        wanted = level is not None and ctx.needs_input_grad[3]
        dtype = x.accumulator if wanted else q.dtype
        turned = replace(x, q=grad, k=v, v=k)  # dQ is to dO what the output is to Q, and dK to dV what V is to K
        dq = chunk_rows(turned, states, dtype, turned=True)
        dk = _grad_tokens(turned, q, grad_states, dtype, turned=True)
        dv = _grad_tokens(x, grad, grad_states, v.dtype)
        dlevel = _grad_level(x, dq, dk, states, grad_states) if wanted else None
        d_initial = grad_states[:, :, 0].clone() if ctx.needs_input_grad[5] else None
        return dq.to(q.dtype), dk.to(k.dtype), dv, dlevel, None, d_initial, None, None, None


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, level: Tensor | None, resets: Tensor | None, scale: float, chunk: int
) -> Chunks:
    if level is not None and resets is not None:
        level, resets = (level * LOG2E.value).contiguous(), resets.contiguous()
    return Chunks(q, k, v, level, resets, scale, chunk)


def _grad_states(x: Chunks, grad: Tensor, grad_final: Tensor) -> States:
    """The gradient of the state before every chunk and after the last."""
    grad_states = x.new_states()
    grad_states[:, :, -1] = grad_final
    strides = (x.q.stride()[:3], grad.stride()[:3])
    x.launch(grad_state_kernel, "features values", x.k.shape[1], x.q, grad, grad_states, *strides)
    return grad_states


def _grad_tokens(x: Chunks, grad: Tensor, grad_states: States, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """dV, from the gradients of the states after every chunk."""
    out = torch.empty(x.v.shape, dtype=dtype, device=x.v.device)
    strides = (x.q.stride()[:3], x.k.stride()[:3], grad.stride()[:3])
    x.launch(token_kernel, "chunks values", x.k.shape[1], x.q, x.k, grad, grad_states, out, *strides, TURNED=turned)
    return out


def _grad_level(x: Chunks, dq: Tensor, dk: Tensor, states: States, grad_states: States) -> Tensor:
    """The gradient of the natural levels, [batch, kv_heads, whole chunks]."""
    of_rows = (x.q * dq).sum(-1).unflatten(1, (x.k.shape[1], -1)).sum(2)  # [B,Hk,N]
    of_tokens = of_rows - (x.k * dk).sum(-1)
    of_tokens = F.pad(of_tokens, (0, x.count * x.chunk - x.k.shape[2]))
    at_end = (states[:, :, 1:] * grad_states[:, :, 1:]).sum((-1, -2))  # [B,Hk,n]
    by_chunk = of_tokens.unflatten(2, (x.count, x.chunk))
    return torch.cat([by_chunk[..., :-1], by_chunk[..., -1:] + at_end[..., None]], -1).flatten(2)


@triton.jit(do_not_specialize=["length", "chunks"])
def grad_state_kernel(
    q, grad, grad_states, q_strides, grad_strides, level, resets, scale,
    heads, group, length, features, values, chunks,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ACC: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of the state of one key head, from the last chunk to the first; the last is given."""
    head = tl.program_id(0).to(tl.int64)
    f, e = tl.program_id(1) * FEATURES, tl.program_id(2) * VALUES
    grad_states += (head + 1) * (chunks + 1) * features * values - features * values + f * values + e
    row = tl.arange(0, FEATURES)
    total = load_tile(grad_states, row, values, features - f, values - e, VALUES)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        added, left = tl.zeros([FEATURES, VALUES], ACC), tl.full([CHUNK], 1.0, ACC)
        if DECAY:
            _, _, left, _, whole = decays(level, resets, head, chunk, chunks, CHUNK)
            total = total * whole
        for member in range(0, group):
            row_head = head * group + member
            q_head = at_head(q, q_strides, row_head, heads * group) + f
            q_tile = load_tile(q_head, t, q_strides[2], length, features - f, FEATURES)
            grad_head = at_head(grad, grad_strides, row_head, heads * group) + e
            grad_tile = load_tile(grad_head, t, grad_strides[2], length, values - e, VALUES)
            if DECAY:
                q_tile = decayed(q_tile, left)
            added += dot(tl.trans(q_tile), grad_tile, ACC)
        total += added * scale
        grad_states -= features * values
        store_tile(grad_states, row, values, features - f, values - e, total, VALUES)


@triton.jit(do_not_specialize=["length", "chunks"])
def token_kernel(
    q, k, grad, grad_states, out, q_strides, k_strides, grad_strides, level, resets, scale,
    heads, group, length, features, values, chunks,
    TURNED: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ACC: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """dV of one key head: one chunk, one tile of values. Its rows and the state after the chunk have read it."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.program_id(2) * VALUES
    k = at_head(k, k_strides, head, heads)
    grad_states += (head * (chunks + 1) + chunk + 1) * features * values
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK, VALUES], ACC)
    for f in range(0, features, FEATURES):
        k_tile = load_tile(k + f, t, k_strides[2], length, features - f, FEATURES)
        state = load_state(grad_states, f, e, features, values, TURNED, FEATURES, VALUES)
        total += dot_state(k_tile, state, ACC, STATE)
    token_level, token_resets = t, t
    if DECAY:
        token_level, token_resets, _, to_end, _ = decays(level, resets, head, chunk, chunks, CHUNK)
        total = total * to_end[:, None]
    for member in range(0, group):
        row_head = head * group + member
        q_head = at_head(q, q_strides, row_head, heads * group)
        scores = tl.zeros([CHUNK, CHUNK], ACC)
        for f in range(0, features, FEATURES):
            q_tile = load_tile(q_head + f, t, q_strides[2], length, features - f, FEATURES)
            k_tile = load_tile(k + f, t, k_strides[2], length, features - f, FEATURES)
            scores += dot(q_tile, tl.trans(k_tile), ACC)
        weights = pair_weights(token_level, token_resets, DECAY, CHUNK, ACC) * scale
        grad_head = at_head(grad, grad_strides, row_head, heads * group) + e
        grad_tile = load_tile(grad_head, t, grad_strides[2], length, values - e, VALUES)
        total += dot(tl.trans((scores * weights).to(grad_tile.dtype)), grad_tile, ACC)
    store_tile(out + head * length * values + e, t, values, length, values - e, total, VALUES)
