"""One linear layer, as in LLaVA: ``connector: linear``."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.part import Part


class Linear(Part):
    """Project vision features to the width of the language model with one matrix.

    Args:
        vision_dim, language_dim: widths, filled in by the composed model.
        bias: add a learned vector.
    """

    source: ClassVar[str] = "LLaVA (NeurIPS 2023), section 4.1"
    verified: ClassVar[str] = "paper"
    token_wise: ClassVar[bool] = True
    spatial: ClassVar[bool] = True

    def __init__(self, vision_dim: int, language_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(vision_dim, language_dim, bias)

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The grid as it is."""
        return rows, cols

    def forward(
        self, tokens: Float[Tensor, "images tokens vision"], grid: tuple[int, int]
    ) -> Float[Tensor, "images tokens language"]:
        return self.layer(tokens)
