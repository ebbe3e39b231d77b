"""DHSA: blocks of rows choose blocks of keys by their means, beside the first and the recent ones."""

from math import ceil
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.selectors.blocks import at_least, best, needs_causal, pairs
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Common

NAME = "dhsa"


@torch.no_grad()
def dhsa(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    row_block: int = 128,
    key_block: int = 32,
    density: float = 0.125,
    first: int = 1,
    **common: Unpack[Common],
) -> BlockLists:
    """Xiong et al. 2025, Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), with blocks of fixed size; causal.

    A query block keeps ``ceil(density * key blocks)`` key blocks: the ``first`` ones and those at its own positions
    always, the rest by mean(q) . mean(k). Where it can see no more than that, it sees all.

    Block sizes, density and the forced blocks are the official defaults; that the budget is a share of all key blocks
    and that the forced ones count in it is our reconstruction, as is the band (own positions only). Not here: chunks
    of predicted length (section 3) and the vertical-slash variant, which needs sums along diagonals.

    The mean of a query block holds its later rows as well, so the choice (not the attention) looks ahead inside a
    block: it is meant for prefill, as in the paper.

    Raises:
        ValueError: shapes that do not fit, ``causal=False``, a density outside 0..1, ``first`` below 0, positions or
            packed documents.
    """
    needs_causal(NAME, common)
    if not 0 <= density <= 1:
        raise ValueError(f"{NAME}: density must be 0..1; found {density}")
    at_least(NAME, 0, first=first)
    p = pairs(NAME, q, k, row_block, key_block, common)
    scores = p.query_means() @ p.key_means().transpose(-1, -2)  # [B,H,query blocks,key blocks]
    return p.lists(best(scores, ceil(density * scores.shape[3]), p.first(first) | p.own(), p.possible()))
