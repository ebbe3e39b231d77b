"""Dense attention by PyTorch's scaled_dot_product_attention, kept on its fused kernels wherever it has one."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm.kernels.row_chunks import in_row_chunks
from vlm.kernels.visibility import Operands, Visibility


def plain(seen: Visibility) -> bool:
    """Whether SDPA needs no mask: every row sees every key, or a triangle that starts at the first key."""
    return seen.by_index and (not seen.causal or seen.rows == seen.keys or (seen.rows == 1 and seen.keys > 0))


def dense_sdpa(x: Operands, with_lse: bool) -> tuple[Tensor, None]:
    """Without padding, documents or positions one call; else a mask for a few rows at a time."""
    assert x.v is not None
    grouped = x.kv_head_of is None and (not x.q.is_cuda or _flash(x.q, x.v))  # elsewhere SDPA has no grouped heads
    k, v = (x.k, x.v) if grouped else (x.per_head(x.k), x.per_head(x.v))
    if plain(x.seen):
        causal = x.seen.causal and x.seen.rows > 1
        out = scaled_dot_product_attention(x.q, k, v, is_causal=causal, scale=x.scale, enable_gqa=grouped)
        return out, None

    def some_rows(rows: slice) -> tuple[Tensor]:
        q, mask = x.q[:, :, rows], x.seen.mask(rows)
        return (scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=x.scale, enable_gqa=grouped),)

    return in_row_chunks(some_rows, x.seen.rows)[0], None


def _flash(q: Tensor, v: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[-1] == v.shape[-1] and q.shape[-1] <= 256
