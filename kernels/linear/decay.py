"""Decays of linear attention: the published tables, and LightNet's, which makes the recurrence a softmax over time."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TABLES = ("paper", "alibi")


def lightning_decay(heads: int, layer: int, layers: int, table: str) -> Float[Tensor, " heads"]:
    """The constant log-decay of every head of layer ``layer`` (from 0) of ``layers``, fp32: 0 or less.

    Two tables go by the name of Lightning Attention, and weights trained with one are useless with the other:

    ``"paper"``: ``-8 h / H (1 - l / L)``, heads h from 0: TransNormerLLM (Qin et al., 2023), position encoding,
        and flash-linear-attention. The first head never forgets.
    ``"alibi"``: minus ALiBi's slopes, ``2^(-8 (h + 1) / H)``, times ``1 - l / (L - 1 + 1e-5) + 1e-5``: the
        lightning-attention repository and MiniMax-01 (2025). Where H is no power of two the slopes are ALiBi's
        interleaved ones, as in that repository; Transformers' MiniMax keeps the formula.

    Raises:
        ValueError: an unknown table, no heads, or a layer outside 0..layers - 1.
    """
    if table not in TABLES:
        raise ValueError(f"lightning_decay: table must be one of {', '.join(TABLES)}; found {table!r}")
    if heads < 1 or not 0 <= layer < layers:
        raise ValueError(
            f"lightning_decay: heads must be 1 or more and layer 0..{layers - 1}; found {heads} heads, layer {layer}"
        )
    if table == "paper":
        slopes, depth = [8 * head / heads for head in range(heads)], 1 - layer / layers
    else:
        slopes, depth = _alibi_slopes(heads), 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return torch.tensor([-slope * depth for slope in slopes], dtype=torch.float32)


def cumulative_softmax(
    k: Float[Tensor, "batch kv_heads length dim"],
    last: Float[Tensor, "batch kv_heads dim"] | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
) -> tuple[
    Float[Tensor, "batch kv_heads length dim"],
    Float[Tensor, "batch kv_heads length dim"],
    Float[Tensor, "batch kv_heads dim"],
]:
    """Keys and log-decays with which causal linear attention has the state ``softmax over s <= t (k_s)^T v_s``.

    LightNet's additive recurrence (Qin et al., 2024): with z_t the logcumsumexp of k per channel, the key is
    exp(k_t - z_t) and the log-decay z_{t-1} - z_t, both in (0, 1] after exp whatever the size of k.

    Args:
        last: z after the tokens before these; None if there are none.
        valid: False at padding (as a key of -inf would be): key 0, decay 1.

    Returns:
        keys, log-decay and the last z, in fp32 (fp64 for fp64). Decode hands the last z back as ``last``.
    """
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    real = k != float("-inf")
    if valid is not None:
        real = real & valid[:, None, :, None]
    low = torch.finfo(k.dtype).min / 4  # instead of -inf, whose differences and gradients would be nan
    before = torch.full_like(k[:, :, 0], low) if last is None else last.to(k.dtype).clamp_min(low)
    z = torch.cat([before[:, :, None], k.masked_fill(~real, low)], 2).logcumsumexp(2)  # [B,H,1+N,D]
    log_decay = (z[:, :, :-1] - z[:, :, 1:]).clamp_max(0)
    key = torch.where(real, torch.exp(k.masked_fill(~real, low) - z[:, :, 1:]), 0.0)
    return key, log_decay, z[:, :, -1]


def _alibi_slopes(heads: int) -> list[float]:
    """ALiBi (Press et al., ICLR 2022): every second slope of twice as many heads fills up to no power of two."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / whole) for head in range(whole)]
    between = [2 ** (-4 * (head + 1) / whole) for head in range(0, 2 * (heads - whole), 2)]
    return slopes + between
