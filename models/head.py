"""What a head is: classes from an encoder's features, so that a backbone can be trained and judged alone."""

from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.encoder import Features


class Head(Protocol):
    """A frozen dataclass in models/heads; its fields are its recipe options.

    ``build`` makes the module that maps (encoder, images [N,3,H,W]) to logits: [N,classes], or [N,classes,h,w] where
    ``per_pixel``. The encoder stays its owner's: no weight of it is in the head.
    """

    source: ClassVar[str]
    verified: ClassVar[str]
    per_pixel: ClassVar[bool]

    def build(self, encoder: Any, classes: int) -> nn.Module: ...


class Classifier(nn.Module):
    """Batch norm without weights, then a linear layer: how frozen features are commonly probed (MAE, section 4.3)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Float[Tensor, "images dim"]) -> Float[Tensor, "images classes"]:
        if self.training and len(pooled) == 1:  # one row has no variance; its statistics would be its own values
            return self.linear(
                nn.functional.batch_norm(pooled, self.norm.running_mean, self.norm.running_var, eps=1e-6)
            )
        return self.linear(self.norm(pooled))


def summary(encoder: Any, features: Features) -> Float[Tensor, "images dim"]:
    """One vector of an image: its class token, or the mean of its tokens where the encoder has none."""
    if encoder.class_token and features.prefix is not None:
        return features.prefix[:, 0]
    return features.tokens.mean(1)


def unit(x: Float[Tensor, "images dim"]) -> Float[Tensor, "images dim"]:
    """Each row at length 1."""
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
