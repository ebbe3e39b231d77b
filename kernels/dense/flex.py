"""Dense attention by FlexAttention: any visibility, with the log-sum-exp; no backward on a CPU."""

from torch import Tensor

from vlm.kernels.flex import flex, grouped_heads, mask_of
from vlm.kernels.visibility import Operands


def dense_flex(x: Operands, with_lse: bool) -> tuple[Tensor, Tensor]:
    return flex(x.q, *grouped_heads(x), block_mask=mask_of(x.seen, x.q.shape[0]), scale=x.scale)
