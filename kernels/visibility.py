"""Which key each query row may see: the one place that turns causality and padding into a mask."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def visible(
    rows: int, keys: int, causal: bool, key_valid: Bool[Tensor, "batch keys"] | None, device: torch.device
) -> Bool[Tensor, "batch_or_1 1 rows keys"]:
    """True where row i may see key j.

    Causality is aligned bottom right: the last row sees every key, so row i sees key j iff
    ``j <= i + keys - rows``. ``key_valid`` hides keys from every row (padding on either side).
    """
    mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril(diagonal=keys - rows)
    if key_valid is not None:
        mask = mask & key_valid[:, None, None, :]
    return mask


def repeat_kv(x: Float[Tensor, "batch kv_heads keys dim"], heads: int) -> Float[Tensor, "batch heads keys dim"]:
    """Give every query head its key/value head: query head h reads h // (heads / kv_heads)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def check_heads(op: str, q: Tensor, k: Tensor, key_valid: Tensor | None) -> None:
    """Refuse shapes that do not fit, naming the argument, what was expected and what was found."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q and k must be [batch, heads, length, dim]; found {tuple(q.shape)}, {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q and k must share batch and dim; found {tuple(q.shape)}, {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: query heads must be a multiple of key heads; found {q.shape[1]} and {k.shape[1]}")
    if key_valid is not None and tuple(key_valid.shape) != (k.shape[0], k.shape[2]):
        expected = (k.shape[0], k.shape[2])
        raise ValueError(f"{op}: key_valid must be [batch, keys] = {expected}; found {tuple(key_valid.shape)}")
