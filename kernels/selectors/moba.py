"""MoBA: every row chooses the blocks of keys whose mean it likes best."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.selectors.blocks import at_least, best, needs_causal, pairs
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Common

NAME = "moba"


@torch.no_grad()
def moba(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    block: int = 512,
    topk: int = 3,
    **common: Unpack[Common],
) -> BlockLists:
    """Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs, section 2.2; causal.

    The gate of a row for a past block is q . mean(keys of the block), keys after their rotation, in fp32. The row's
    own block is always chosen and counts as one of ``topk``; later blocks never are. Each row chooses for itself, so
    lists have one row per query block. The choice of a row depends on nothing after it.

    Checked against the official definition (the repository's naive version). Padding keys take no part in means.
    Default sizes are those of the language models there; for images take blocks of 64 to 256.

    Raises:
        ValueError: shapes that do not fit, ``topk`` below 1, ``causal=False``, positions or packed documents.
    """
    needs_causal(NAME, common)
    at_least(NAME, 1, topk=topk)
    p = pairs(NAME, q, k, 1, block, common)
    gate = p.x.q.to(p.x.accumulator) @ p.key_means().transpose(-1, -2)  # [B,H,Q,key blocks]
    return p.lists(best(gate, topk, p.own(), p.possible()))
