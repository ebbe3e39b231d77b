"""Orders of tokens: a permutation with its inverse."""

from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from vlm.kernels.plans import plan


class Order(NamedTuple):
    """A new order of tokens: ``forward[i]`` is the token at place i, ``inverse[t]`` the place of token t."""

    forward: Int[Tensor, " tokens"]
    inverse: Int[Tensor, " tokens"]

    @staticmethod
    def of(forward: Int[Tensor, " tokens"]) -> "Order":
        return Order(forward, forward.argsort())

    def apply(self, x: Tensor, dim: int = 2) -> Tensor:
        """``x`` with its tokens in the new order; they lie in dimension 2 of q, k and v."""
        return x.index_select(dim, self.forward)

    def undo(self, x: Tensor, dim: int = 2) -> Tensor:
        """``x`` back in the order before :meth:`apply`."""
        return x.index_select(dim, self.inverse)

    def positions(self, batch: int) -> Int[Tensor, "{batch} tokens"]:
        """What each place's token was before: ``q_pos`` and ``k_pos`` for causal attention in the new order."""
        return self.forward.expand(batch, -1)


def boxes(op: str, grid: tuple[int, ...], box: tuple[int, ...], device: torch.device) -> Order:
    """Tokens of a grid (row-major) box by box, boxes and the tokens inside each row-major.

    Raises ValueError when an axis of the grid is not a multiple of the box's.
    """
    if len(grid) != len(box) or min(*grid, *box) < 1 or any(n % b for n, b in zip(grid, box, strict=True)):
        raise ValueError(f"{op}: a grid of {grid} cannot be cut into boxes of {box}: each axis must be a multiple")
    return _boxes(tuple(grid), tuple(box), device)


@plan(Order)
def _boxes(grid: tuple[int, ...], box: tuple[int, ...], device: torch.device) -> Order:
    sizes = [size for n, b in zip(grid, box, strict=True) for size in (n // b, b)]
    axes = [*range(0, len(sizes), 2), *range(1, len(sizes), 2)]
    return Order.of(torch.arange(prod(grid), device=device).view(sizes).permute(axes).flatten())
