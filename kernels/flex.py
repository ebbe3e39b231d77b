"""FlexAttention, compiled on a GPU and plain on a CPU, with the log-sum-exp and the mask of our operations."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from vlm.kernels.visibility import Operands, Visibility


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=None)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, natural log-sum-exp)``. Query heads are a multiple of key heads. A row that sees nothing: 0, -inf."""
    call = _compiled() if q.is_cuda else flex_attention
    out, aux = call(
        q, k, v, score_mod, block_mask, scale, q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


def mask_of(seen: Visibility, batch: int) -> BlockMask | None:
    """The block mask of a visibility, None where every row sees every key."""
    if seen.by_index and not seen.causal:
        return None
    return block_mask(seen.mask_mod(batch), None if seen.by_index else batch, seen)


def block_mask(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], batch: int | None, seen: Visibility
) -> BlockMask:
    """A block mask for any mask function that does not depend on the head."""
    on_gpu = seen.device.type == "cuda"
    return create_block_mask(mask_mod, batch, None, seen.rows, seen.keys, device=seen.device, _compile=on_gpu)


def grouped_heads(x: Operands) -> tuple[Tensor, Tensor]:
    """Keys and values as FlexAttention takes them: expanded only when the head map is not the even one."""
    assert x.v is not None
    if x.kv_head_of is None:
        return x.k, x.v
    return x.per_head(x.k), x.per_head(x.v)
