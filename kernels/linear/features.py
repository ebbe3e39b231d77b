"""Feature maps of linear attention: what takes the place of the softmax.

identity   x
silu       x sigmoid(x)            TransNormerLLM and Lightning Attention (Qin et al., 2023 and 2024)
elu+1      exp(x) below 0, x + 1   Linear Transformers (Katharopoulos et al., ICML 2020)
taylor2    the map with  phi(x) . phi(y) = 1 + x.y + (x.y)^2 / 2,  exp to second order
           BASED (Arora et al., ICML 2024)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEATURES = ("identity", "silu", "elu+1", "taylor2")


def feature_dim(feature: str, dim: int) -> int:
    """How many features a vector of ``dim`` numbers becomes. Of x_i x_j and x_j x_i only one is kept."""
    return 1 + dim + dim * (dim + 1) // 2 if feature == "taylor2" else dim


def feature_map(feature: str, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead features"]:
    """The features of ``x``, in fp32 at least (the identity leaves the type as it is)."""
    if feature == "identity":
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if feature == "silu":
        return F.silu(x)
    return F.elu(x) + 1 if feature == "elu+1" else _taylor2(x)


def similarity(
    feature: str, q: Float[Tensor, "*lead rows features"], k: Float[Tensor, "*lead keys features"]
) -> Float[Tensor, "*lead rows keys"]:
    """``q k^T`` of vectors that are features already, 0 where a vector is all 0 (padding).

    The products of ``taylor2`` come from the scores themselves, a tenth of the work: the first features are 1 and x.
    """
    if feature != "taylor2":
        return q @ k.transpose(-1, -2)
    dim = _dim_of(q.shape[-1])
    both = q[..., :1] * k[..., None, :, 0]
    score = q[..., 1 : 1 + dim] @ k[..., 1 : 1 + dim].transpose(-1, -2)
    return both + score + score * score / 2


def _taylor2(x: Tensor) -> Tensor:
    dim = x.shape[-1]
    # row i of the upper triangle of x x^T; off the diagonal a product stands for two, each weighing 1/2
    rows = [x[..., i:] * x[..., i : i + 1] * _pair_weights(dim - i, x) for i in range(dim)]
    return torch.cat([torch.ones_like(x[..., :1]), x, *rows], -1)


def _pair_weights(count: int, like: Tensor) -> Tensor:
    weights = torch.ones(count, dtype=like.dtype, device=like.device)
    weights[0] = 0.5**0.5
    return weights


def _dim_of(features: int) -> int:
    """The dim that has this many ``taylor2`` features."""
    return next(dim for dim in range(features) if feature_dim("taylor2", dim) >= features)
