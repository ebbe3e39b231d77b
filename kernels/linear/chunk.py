"""Linear attention in chunks of matrix products: plain PyTorch, any decay, differentiable, best on a CPU.

Inside a chunk the scores are computed as such (chunk x chunk), what comes from before it goes through the state at its
start, and only the states, one a chunk, are computed one after the other (Lightning Attention 2, Qin et al., 2024;
GLA, Yang et al., ICML 2024). Decays are sums of log-decays over the tokens between, never quotients or differences of
longer sums, so that no factor exceeds 1 and -inf is a number like any other. Everything is computed in fp32 (fp64).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.linear.features import similarity
from vlm.kernels.linear.scan import Scan

SMALL = 16  # with a decay per channel, the tokens of a chunk that are taken row after row
LOWEST = -1e30  # its exp is 0
Scores = Callable[[Tensor, Tensor], Tensor]


def scan_chunked(
    x: Scan,
) -> tuple[Float[Tensor, "batch heads length value_dim"], Float[Tensor, "batch kv_heads features value_dim"]]:
    """The scan with matrix products; without order two of them, or two scans where there are documents."""
    q, k, v = (t.to(x.accumulator) for t in (x.q, x.k, x.v))
    q = q.unflatten(1, (k.shape[1], x.group))  # [B,Hk,G,N,F]
    state = x.first_state()
    scores = partial(similarity, x.feature)
    if x.causal:
        out, state = _scan(q, k, v, x.decay_and_starts(), state, x.chunk, scores)
    elif x.starts is None:
        state = state + k.transpose(-1, -2) @ v
        out = q @ state[:, :, None]
    else:
        out, state = _both_ways(x, q, k, v, state, scores)
    return (out.flatten(1, 2) * x.scale).to(x.out_dtype), state


def _both_ways(x: Scan, q: Tensor, k: Tensor, v: Tensor, state: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Every token of a document for each of its rows: those up to the row and those from it on, less the row itself."""
    assert x.starts is not None
    before, state = _scan(q, k, v, x.decay_and_starts(), state, x.chunk, scores)
    ends = x.starts.roll(-1, 1).flip(1)  # read backwards a document starts at its last token
    decay = torch.zeros_like(k[:, :, :, :1]).masked_fill(ends[:, None, :, None], float("-inf"))
    after, _ = _scan(q.flip(-2), k.flip(-2), v.flip(-2), decay, None, x.chunk, scores)
    itself = (q * k[:, :, None]).sum(-1, keepdim=True) * v[:, :, None]
    return before + after.flip(-2) - itself, state


def _scan(
    q: Float[Tensor, "*lead group length features"],
    k: Float[Tensor, "*lead length features"],
    v: Float[Tensor, "*lead length value_dim"],
    decay: Float[Tensor, "*lead_or_one length one_or_features"] | None,
    state: Float[Tensor, "*lead features value_dim"] | None,
    chunk: int,
    scores: Scores,
) -> tuple[Float[Tensor, "*lead group length value_dim"], Float[Tensor, "*lead features value_dim"]]:
    length = k.shape[-2]
    chunk = min(chunk, max(1, length))
    q = _cut(q, chunk).movedim(-4, -3)  # [..,n,G,c,F]
    k, v = _cut(k, chunk), _cut(v, chunk)  # [..,n,c,F], [..,n,c,E]
    decay = None if decay is None else _cut(decay, chunk)  # [..,n,c,1 or F]
    out = _within(q, k, v, decay, scores)  # [..,n,G,c,E]
    if decay is not None:
        q = q * decay.cumsum(-2).exp().unsqueeze(-3)
        k = k * _sum_after(decay).exp()
    updates = k.transpose(-1, -2) @ v  # [..,n,F,E]
    total = None if decay is None else decay.sum(-2).exp()[..., None]  # [..,n,1 or F,1]
    states = _states(updates, total, state)  # [..,1+n,F,E]
    rows = q.flatten(-3, -2)  # [..,n,G*c,F]: one product for all query heads of a key head
    out = out + (rows @ states[..., :-1, :, :]).unflatten(-2, q.shape[-3:-1])
    return out.movedim(-4, -3).flatten(-3, -2)[..., :length, :], states[..., -1, :, :]


def _within(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scores: Scores) -> Tensor:
    """What the rows of a chunk get from the keys of the same chunk."""
    shape = q.shape[-3:-1]  # G, c
    if decay is not None and decay.shape[-1] > 1:
        if k.shape[-2] > SMALL:
            return _scan(q, k, v, decay, None, SMALL, scores)[0]
        attention = _scores_per_channel(q, k, decay)
    else:
        attention = scores(q.flatten(-3, -2), k).unflatten(-2, shape)  # [..,n,G,c,c]
        attention = attention.tril() if decay is None else attention * _pairwise(decay[..., 0]).unsqueeze(-3)
    return (attention.flatten(-3, -2) @ v).unflatten(-2, shape)


def _scores_per_channel(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """[.., G, c, c]: scores with a decay of their own in every channel, row after row: the keys so far decay."""
    count, left, rows = k.shape[-2], decay.exp(), []
    kept = k[..., :0, :]
    for r in range(count):
        kept = torch.cat([kept * left[..., r : r + 1, :], k[..., r : r + 1, :]], -2)  # [..,r+1,F]
        rows.append(F.pad(q[..., r, :] @ kept.transpose(-1, -2), (0, count - r - 1)))  # [..,G,c]
    return torch.stack(rows, -2)


def _states(updates: Tensor, total: Tensor | None, state: Tensor | None) -> Tensor:
    """[.., 1 + n, F, E]: the state before every chunk and after the last, from what each chunk adds."""
    first = torch.zeros_like(updates[..., 0, :, :]) if state is None else state
    if total is None:
        return torch.cat([first.unsqueeze(-3), updates], -3).cumsum(-3)
    states = [first]
    for decay, update in zip(total.unbind(-3), updates.unbind(-3), strict=True):
        states.append(decay * states[-1] + update)
    return torch.stack(states, -3)


def _pairwise(decay: Tensor) -> Tensor:
    """[.., r, s]: exp of the sum of the log-decays of the tokens after s up to r; 0 where s comes after r."""
    later = torch.ones(decay.shape[-1], decay.shape[-1], dtype=decay.dtype, device=decay.device).tril(-1)
    between = decay.clamp_min(LOWEST)[..., None] * later  # a sum of these stays finite, and 0 times it is 0
    return between.cumsum(-2).exp().tril()


def _sum_after(decay: Tensor) -> Tensor:
    """The sum of the log-decays of the tokens after each, in its chunk."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """[.., length, D] into [.., n, chunk, D], filled up with zeros: keys that count nothing, log-decays that keep."""
    count = max(1, -(-x.shape[-2] // chunk))
    return F.pad(x, (0, 0, 0, count * chunk - x.shape[-2])).unflatten(-2, (count, chunk))
