"""The definition of block-sparse attention in plain PyTorch: any float type, any device, differentiable."""

from torch import Tensor

from vlm.kernels.row_chunks import softmax
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Operands


def block_sparse_reference(x: Operands, lists: BlockLists) -> tuple[Tensor, Tensor]:
    assert x.v is not None
    listed = lists.mask(x.q.shape[2], x.k.shape[2])  # [B or 1,H or 1,Q,K]
    weights, lse = softmax(x.scores().masked_fill(~listed, float("-inf")))  # [B,H,Q,K], [B,H,Q]
    return weights.to(x.v.dtype) @ x.per_head(x.v), lse
