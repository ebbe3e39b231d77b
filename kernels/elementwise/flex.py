"""Elementwise attention by FlexAttention: the softmax of log f(s) times its own denominator is f(s)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.kernels.elementwise.reference import MOST_EXPONENT, Weighing
from vlm.kernels.flex import flex, grouped_heads, mask_of
from vlm.kernels.visibility import Operands


def elementwise_flex(x: Operands, how: Weighing) -> Tensor:
    bias = how.bias
    if how.fn == "sigmoid":
        score_mod = lambda s, b, h, i, j: logsigmoid(s + bias[b, h, i])  # noqa: E731
    else:
        score_mod = lambda s, b, h, i, j: torch.clamp(s + bias[b, h, i], max=MOST_EXPONENT)  # noqa: E731
    mask = mask_of(x.seen, x.q.shape[0])
    out, lse = flex(x.q, *grouped_heads(x), score_mod=score_mod, block_mask=mask, scale=x.scale)
    out = out.to(lse.dtype) * lse.exp()[..., None]
    return how.normalised(x, out, slice(None)).to(x.q.dtype)
