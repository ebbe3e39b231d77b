"""A linear probe: ``head: {use: linear}``."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.head import Classifier, summary


@dataclass(frozen=True)
class Linear:
    """Batch norm and a linear layer on the class token, or on the mean token where the encoder has none."""

    source: ClassVar[str] = "MAE (CVPR 2022), section 4.3"
    verified: ClassVar[str] = "definition"
    per_pixel: ClassVar[bool] = False

    def build(self, encoder: Any, classes: int) -> nn.Module:
        return LinearProbe(encoder.dim, classes)


class LinearProbe(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.classifier = Classifier(dim, classes)

    def forward(self, encoder: Any, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        return self.classifier(summary(encoder, encoder(images)))
