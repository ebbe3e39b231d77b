"""PowerAttention: recent blocks and those at distances that are powers of two."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.selectors.blocks import aligned, at_least, needs_causal
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Common

NAME = "power"


@torch.no_grad()
def power(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    block: int = 128,
    window: int = 2,
    first: int = 1,
    **common: Unpack[Common],
) -> BlockLists:
    """Chen et al. 2025, PowerAttention (arXiv 2503.03588); causal, the same for all heads.

    Block i sees block j iff ``j`` is one of the ``first`` blocks, ``0 <= i - j < window``, or ``i - j`` is a power of
    two: after d layers a block has heard of every block at a distance below 2**d.

    A reconstruction: the paper's abstract says that the receptive field grows exponentially with depth and without
    holes; its rule for blocks, its window and its sinks could not be checked, and there is no official code.

    Raises:
        ValueError: shapes that do not fit, ``window`` below 1, ``first`` below 0, ``causal=False``, positions or
            packed documents.
    """
    needs_causal(NAME, common)
    at_least(NAME, 1, window=window)
    at_least(NAME, 0, first=first)
    p = aligned(NAME, q, k, block, common)
    distance = p.start[:, None, :, None] // block - p.key_numbers()  # [B or 1,1,query blocks,key blocks]
    power_of_two = (distance > 0) & (distance & (distance - 1) == 0)
    recent = (distance >= 0) & (distance < window)
    return p.lists(power_of_two | recent | p.first(first))
