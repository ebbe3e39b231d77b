"""Efficient probing: learned queries pool the patches, each into its own share of the channels: ``head: {use: ep}``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.head import Classifier


@dataclass(frozen=True)
class Ep:
    """Multi-query attention pooling without key or query projection, then batch norm and a linear layer.

    queries: pooling queries. reduce: the pooled vector has 1/reduce of the tokens' width. prefix: pool class token and
    registers too, where the encoder has some.

    The paper trains it with LARS; here it trains with the stage's AdamW.
    """

    source: ClassVar[str] = "Efficient Probing (ICLR 2026), section 3; official code"
    verified: ClassVar[str] = "golden"
    per_pixel: ClassVar[bool] = False

    queries: int = 32
    reduce: int = 1
    prefix: bool = False

    def build(self, encoder: Any, classes: int) -> nn.Module:
        return EpProbe(EfficientProbing(encoder.dim, self.queries, self.reduce), classes, self.prefix)


class EfficientProbing(nn.Module):
    """Pools tokens [N,P,D] to [N,D/reduce]; parameters queries x D + D x D / reduce, keys as the official module's.

    Raises ModelError where the width is no multiple of ``queries * reduce``.
    """

    def __init__(self, dim: int, queries: int = 32, reduce: int = 1) -> None:
        super().__init__()
        if queries < 1 or reduce < 1 or dim % (queries * reduce):
            raise ModelError(
                f"head ep: expected queries * reduce to divide the encoder's width {dim}; found {queries} * {reduce}"
            )
        self.queries = queries
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, queries, dim))
        self.v = nn.Linear(dim, dim // reduce, bias=False)

    def attention(self, tokens: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images queries patches"]:
        """How much of each token each query takes; also a score of tokens for pruners."""
        queries = self.cls_token.to(tokens.dtype)
        return (queries @ tokens.transpose(1, 2) * tokens.shape[2] ** -0.5).softmax(-1)

    def groups(self, tokens: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images queries part"]:
        """What each query pooled: query m takes the m-th group of the value channels."""
        values = self.v(tokens).unflatten(2, (self.queries, -1)).transpose(1, 2)  # [N,Q,P,D/(reduce Q)]
        return (self.attention(tokens).unsqueeze(2) @ values).squeeze(2)

    def forward(self, tokens: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images pooled"]:
        return self.groups(tokens).flatten(1)


class EpProbe(nn.Module):
    def __init__(self, pool: EfficientProbing, classes: int, prefix: bool) -> None:
        super().__init__()
        self.pool, self.prefix = pool, prefix
        self.classifier = Classifier(pool.v.out_features, classes)

    def forward(self, encoder: Any, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        found = encoder(images)
        tokens = found.tokens
        if self.prefix and found.prefix is not None:
            tokens = torch.cat([found.prefix, tokens], 1)
        return self.classifier(self.pool(tokens))
