"""The definition of linear attention in plain PyTorch, token by token: any float type, any device, differentiable."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.linear.scan import Scan


def step(
    q: Float[Tensor, "batch heads features"],
    k: Float[Tensor, "batch kv_heads features"],
    v: Float[Tensor, "batch kv_heads value_dim"],
    decay: Float[Tensor, "one_or_batch kv_heads one_or_features"] | None,
    state: Float[Tensor, "batch kv_heads features value_dim"],
) -> tuple[Float[Tensor, "batch heads value_dim"], Float[Tensor, "batch kv_heads features value_dim"]]:
    """One token: the row of the output (not scaled) and the state after it. ``decay`` is no logarithm."""
    if decay is not None:
        state = decay[..., None] * state
    state = state + k[..., :, None] * v[..., None, :]
    rows = q.unflatten(1, (k.shape[1], -1))  # [B,Hk,G,F]
    return (rows @ state).flatten(1, 2), state


def scan_reference(
    x: Scan,
) -> tuple[Float[Tensor, "batch heads length value_dim"], Float[Tensor, "batch kv_heads features value_dim"]]:
    q, k, v = (t.to(x.accumulator) for t in (x.q, x.k, x.v))
    if not x.causal:
        out, state = _all_at_once(x, q, k, v)
    else:
        state, rows = x.first_state(), []
        decay = x.decay_and_starts()
        for t in range(q.shape[2]):
            now = None if decay is None else decay[:, :, t].exp()
            row, state = step(q[:, :, t], k[:, :, t], v[:, :, t], now, state)
            rows.append(row)
        out = torch.stack(rows, 2) if rows else q.new_zeros(*q.shape[:3], v.shape[-1])
    return (out * x.scale).to(x.out_dtype), state


def _all_at_once(x: Scan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Without order: the scores of a row with every key of its document, and the state that its document began with."""
    document = torch.zeros(k.shape[0], k.shape[2], dtype=torch.long, device=k.device)
    if x.starts is not None:
        document = x.starts.long().cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]  # [B,1,N,N]
    first = (document == 0)[:, None, :, None]  # [B,1,N,1]
    final = document[:, -1:] if document.shape[1] else document.new_zeros(len(document), 1)
    last = (document == final)[:, None, :, None]
    per_head = lambda t: t.repeat_interleave(x.group, 1)  # noqa: E731
    state = x.first_state()
    out = (q @ per_head(k).transpose(-1, -2) * same) @ per_head(v) + first * (q @ per_head(state))
    return out, state * (final == 0)[:, None, :, None] + (k * last).transpose(-1, -2) @ v
