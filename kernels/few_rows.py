"""Attention of a few rows to many keys, as at a decoding step: where nearly all time goes into reading keys and values.

Both functions read them where they lie: not repeated for the query heads that share them, not widened on a GPU.
"""

import torch
from jaxtyping import Float
from torch import Tensor

FEW = 16  # rows of all heads that share a key head


def scores_of(
    q: Float[Tensor, "batch heads rows dim"], k: Float[Tensor, "batch kv_heads keys dim"], scale: float
) -> Float[Tensor, "batch heads rows keys"]:
    """Scaled products in single precision or more."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, -1, dim)  # [B,KV,G*R,D]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled():
        # Sums stay in single precision and keys as they are: a wide copy of the cache would be read at every token.
        flat = torch.bmm(grouped.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=wide)
        return flat.view(batch, heads, rows, keys) * scale
    few = grouped.to(wide) * scale
    if few.shape[2] <= FEW and not q.is_cuda:
        # On a CPU keys times queries take less than half of the time of queries times keys, which packs all keys first.
        return (k.to(wide) @ few.transpose(2, 3)).transpose(2, 3).reshape(batch, heads, rows, keys)
    return (few @ k.to(wide).transpose(2, 3)).view(batch, heads, rows, keys)


def mixed(
    weights: Float[Tensor, "batch heads rows keys"], v: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch heads rows dim"]:
    """Values mixed by attention weights, in the type of the values (to which fused attention rounds weights too)."""
    batch, heads, rows, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, keys)  # [B,KV,G*R,K]
    return (grouped.to(v.dtype) @ v).view(batch, heads, rows, v.shape[3])
