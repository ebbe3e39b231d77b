"""What a connector promises: the protocol that the files of ``models/connectors`` keep."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Connector(Protocol):
    """From a grid of vision features to visual tokens as wide as the language model.

    token_wise: every output token is made of the input token in the same place alone, so that the connector takes any
    subset of the grid, padding among it; without it nothing can be pruned before the connector.
    spatial: output token (row, column) of :meth:`grid` shows that part of the picture; without it the padding of a
    tiled picture cannot be told from its tokens and stays.
    """

    token_wise: bool
    spatial: bool

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The grid of visual tokens that a rows x cols grid of features becomes."""
        ...

    def __call__(
        self, tokens: Float[Tensor, "images tokens vision"], grid: tuple[int, int]
    ) -> Float[Tensor, "images visual language"]:
        """Project features in raster order of ``grid``; fewer than the grid holds only where ``token_wise``."""
        ...
