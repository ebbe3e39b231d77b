"""The definition of block-sparse attention in plain PyTorch: any float type, any device, differentiable."""

import torch
from torch import Tensor

from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Operands


def block_sparse_reference(x: Operands, lists: BlockLists) -> tuple[Tensor, Tensor]:
    assert x.v is not None
    listed = lists.mask(x.q.shape[2], x.k.shape[2])  # [B or 1,H or 1,Q,K]
    scores = x.scores().masked_fill(~listed, float("-inf"))  # [B,H,Q,K]
    lse = scores.logsumexp(-1)  # -inf for a row that sees nothing
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    return weights.to(x.v.dtype) @ x.per_head(x.v), lse
