"""S2: local blocks and every so many blocks, shifted from head to head."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.selectors.blocks import aligned, at_least
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Common

NAME = "s2"


@torch.no_grad()
def s2(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    block: int = 64,
    local: int = 32,
    stride: int = 8,
    offset: int = 0,
    dense_heads: int = 0,
    **common: Unpack[Common],
) -> BlockLists:
    """Lin et al. 2024, S2-Attention: heterogeneous context sharding (arXiv 2407.17678), as the dkernel library has it.

    Causal: block j is seen from block i of key head h iff ``j <= i`` and (``i - j < local`` or
    ``(j + h * step + offset) % stride == 0``), ``step = max(1, stride // heads)``. Not causal: the distance beyond the
    local band counts instead, the same in every head: ``max(0, |i - j| - local + 1) % stride == 0``. The last
    ``dense_heads`` key heads see everything. Query heads that share a key head share its pattern.

    Formula, the position of dense heads and the defaults checked against dkernel (its README's example; used by
    phi-3-small with its own). Blocks count from key 0.

    Raises:
        ValueError: shapes that do not fit, ``local`` or ``stride`` below 1, ``dense_heads`` outside 0..kv_heads,
            positions or packed documents.
    """
    kv_heads, heads = k.shape[1], q.shape[1]
    at_least(NAME, 1, local=local, stride=stride)
    if not 0 <= dense_heads <= kv_heads:
        raise ValueError(f"{NAME}: dense_heads must be 0..{kv_heads}; found {dense_heads}")
    p = aligned(NAME, q, k, block, common)
    i, j = p.start[:, None, :, None] // block, p.key_numbers()
    key_head = p.x.head_map()[:, None, None]  # [H,1,1]
    if p.x.seen.causal:
        strided = (j + key_head * max(1, stride // heads) + offset) % stride == 0
        seen = strided | (i - j < local)  # [B or 1,H,query blocks,key blocks]
    else:
        seen = ((i - j).abs() - local + 1).clamp_min(0) % stride == 0
    return p.lists(seen | (key_head >= kv_heads - dense_heads))
