"""The connector of LLaVA-1.5 and, with ``shuffle``, of InternVL: ``connector: {use: mlp, depth: 2, shuffle: 2}``."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.part import Part


class Mlp(Part):
    """Project vision features to the width of the language model with a GELU MLP.

    Args:
        vision_dim, language_dim: widths, filled in by the composed model.
        depth: number of linear layers (LLaVA-1.5: 2; Liu et al., CVPR 2024, section 3.3).
        shuffle: fold each shuffle x shuffle square of tokens into one (pixel-shuffle; InternVL 1.5, section 3.1).
    """

    source: ClassVar[str] = "LLaVA-1.5 (CVPR 2024), section 3.3; pixel-shuffle: InternVL 1.5, section 3.1"
    verified: ClassVar[str] = "paper"
    spatial: ClassVar[bool] = True

    def __init__(self, vision_dim: int, language_dim: int, depth: int = 2, shuffle: int = 1) -> None:
        super().__init__()
        if depth < 1 or shuffle < 1:
            raise ModelError(f"model.connector: depth and shuffle must be at least 1; found {depth} and {shuffle}")
        self.shuffle = shuffle
        layers: list[nn.Module] = [nn.Linear(vision_dim * shuffle**2, language_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(language_dim, language_dim)]
        self.layers = nn.Sequential(*layers)

    @property
    def token_wise(self) -> bool:
        return self.shuffle == 1

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The grid of visual tokens of a rows x cols grid of features. Raises ModelError if it does not fold."""
        if rows % self.shuffle or cols % self.shuffle:
            raise ModelError(f"model.connector: shuffle {self.shuffle} does not divide the grid {rows} x {cols}")
        return rows // self.shuffle, cols // self.shuffle

    def forward(
        self, tokens: Float[Tensor, "images tokens vision"], grid: tuple[int, int]
    ) -> Float[Tensor, "images folded language"]:
        if self.shuffle > 1:
            s, (rows, cols) = self.shuffle, self.grid(*grid)
            x = tokens.unflatten(1, (rows, s, cols, s)).transpose(2, 3)  # [N,rows,cols,s,s,V]
            tokens = x.flatten(3).flatten(1, 2)  # [N,rows*cols,s*s*V]
        return self.layers(tokens)
