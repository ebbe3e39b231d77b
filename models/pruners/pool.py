"""Average pooling of neighbouring tokens: the baseline that merging methods must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.program import LLM_IN, Position, Program, Selector, Tokens, cut
from vlm.models.program.quota import divide
from vlm.models.program.reduce import Reduced, reduced
from vlm.models.program.segments import places, weighted_sums
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Pool:
    """The means of neighbouring visual tokens, exactly as many as asked, before the language model.

    An image's grid is cut into bands of rows, and each band into cells: bands so that cells are about square, cells of
    a band as equal as whole columns allow, the first bands having one more where the number does not divide (16 of
    24 x 24 are 4 x 4 cells of 6 x 6 tokens). Where a cell would be empty (images of several grids), it is runs of
    tokens in their order instead. A cell's mean stands at the place of the middle one of its tokens. The images of a
    sample share its budget by their tokens; none is averaged with another.
    """

    source: ClassVar[str] = "baseline; Are We Solving the Right Problem? (arXiv 2502.11501)"
    verified: ClassVar[str] = "definition"

    keep: Budget
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        return cut(facts, LLM_IN, self.keep, Selector(_middles, reduce=_means), self.position)


def _middles(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
    """Marks the middle token of each cell."""
    cell = _cells(tokens, count)
    order = cell.masked_fill(cell < 0, cell.shape[1]).argsort(dim=1, stable=True)  # cell after cell, in their order
    own = cell.gather(1, order).masked_fill(~tokens.valid.gather(1, order), cell.shape[1])
    first, after = torch.searchsorted(own, own), torch.searchsorted(own, own, right=True)
    place = torch.arange(cell.shape[1], device=cell.device)
    return torch.zeros_like(tokens.valid).scatter(1, order, place == (first + after) // 2) & (cell >= 0)


def _means(tokens: Tokens, kept: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Reduced:
    """The mean of each cell, at its marked token."""
    cell = _cells(tokens, count)
    place, there = places(kept)
    member = (cell.gather(1, place)[..., None] == cell[:, None]) & there[..., None]  # [S,K,P]
    size = member.sum(2)
    weight: Float[Tensor, "segments kept tokens"] = member.double() / size[..., None].clamp_min(1)
    return reduced(place, weighted_sums(weight, tokens.x, tokens.valid), there, size.float())


def _cells(tokens: Tokens, count: Int[Tensor, " segments"]) -> Int[Tensor, "segments tokens"]:
    """The cell of each token, numbered over its segment; -1 for padding and for images that get no cell."""
    cell = torch.full_like(tokens.image, -1)
    for s, wanted in enumerate(count.tolist()):
        image = tokens.image[s].masked_fill(~tokens.valid[s], -1)
        images = [number for number in image.unique().tolist() if number >= 0]
        sizes = [int((image == number).sum()) for number in images]
        start = 0
        for number, share in zip(images, divide(wanted, sizes, sizes), strict=True):
            mine = (image == number).nonzero()[:, 0]
            if share:
                cell[s, mine] = start + _cells_of_image(tokens.row[s, mine], tokens.col[s, mine], share)
            start += share
    return cell


def _cells_of_image(row: Int[Tensor, " tokens"], col: Int[Tensor, " tokens"], count: int) -> Int[Tensor, " tokens"]:
    """The cell, 0..count-1, of each token of an image."""
    rows, columns = int(row.max()) + 1, int(col.max()) + 1
    bands = max(round((count * rows / columns) ** 0.5), -(-count // columns))
    bands = min(bands, rows, count)
    band, (each, more) = row * bands // rows, divmod(count, bands)
    across = each + (band < more).long()  # cells of the token's band
    cell = band * each + band.clamp_max(more) + col * across // columns
    if int(cell.max()) >= count or bool((cell.bincount(minlength=count) == 0).any()):
        cell = torch.arange(len(row), device=row.device) * count // len(row)
    return cell
