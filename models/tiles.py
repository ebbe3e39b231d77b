"""Images that come whole and in tiles (LLaVA-NeXT), or in their own shapes: what tokens show, and which are padding."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.splice import Visual


class TileTable(NamedTuple):
    """What the views of a batch of tiled images are: those of one image follow each other, the whole image first.

    image: the image that each view shows. row, col: places of its tokens in the image's grid, in which the tiles,
    joined to one picture, stand below the whole image. real: tokens that show some of the picture. number: a real
    token's number in its image, counted row by row. size: real tokens of each image. columns: of the widest grid.
    """

    image: Int[Tensor, " views"]
    row: Int[Tensor, "views tokens"]
    col: Int[Tensor, "views tokens"]
    real: Bool[Tensor, "views tokens"]
    number: Int[Tensor, "views tokens"]
    size: Int[Tensor, " images"]
    columns: int

    def sum_by_image(self, value: Int[Tensor, " views"]) -> Int[Tensor, " images"]:
        return torch.zeros_like(self.size).scatter_add(0, self.image, value)

    def join(
        self,
        features: Float[Tensor, "views kept width"],
        owner: Int[Tensor, " images"],
        place: Int[Tensor, "views kept"] | None = None,
        valid: Bool[Tensor, "views kept"] | None = None,
        whole: bool = False,
    ) -> Visual:
        """The views' tokens as those of images, each image's in the order of its grid, without padding.

        place, valid: what a cut left of each view's grid; all by default.
        """
        row, col, number, real = self.row, self.col, self.number, self.real
        if place is not None:
            row, col, number, real = (field.gather(1, place) for field in (row, col, number, real))
        real = real if valid is None else real & valid
        image = self.image[:, None].expand(number.shape)
        counts = self.sum_by_image(real.sum(1))
        longest = int(counts.max())
        key = (image * (int(self.size.max()) + 1) + number).masked_fill(~real, torch.iinfo(torch.long).max)
        order = key.flatten().argsort(stable=True)[: int(counts.sum())]  # real tokens, image by image
        at = image.flatten()[order]
        column = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[at]
        index = order.new_zeros(len(counts), longest).index_put((at, column), order)
        width = torch.arange(longest, device=order.device)
        grid = (int(self.row.max()) + 1, self.columns)
        joined = Visual(
            features.flatten(0, 1)[index],
            grid,
            owner,
            (row * self.columns + col).flatten()[index],
            width < counts[:, None],
            whole,
        )
        joined.number, joined.size = number.flatten()[index], self.size
        return joined


def tile_table(tiles: Int[Tensor, "images 4"], grid: tuple[int, int], spatial: bool, views: int) -> TileTable:
    """The table of a batch whose image n has ``tiles[n]``: rows and columns of tiles, height and width of the picture.

    grid: of a view's tokens. spatial: whether a token's place says what it shows; if not, the tiles' grids stand one
    below the other and no token is taken for padding.
    Padding is what LLaVA-NeXT removes: rows or columns of the joined grid that the picture, fitted in the middle,
    does not reach. Raises ModelError unless the batch has as many views as the tiles make.
    """
    rows, cols = tiles[:, 0], tiles[:, 1]
    each = 1 + rows * cols
    if int(each.sum()) != views:
        raise ModelError(f"images: expected {int(each.sum())} views, the whole of each and its tiles; found {views}")
    image = torch.arange(len(tiles), device=tiles.device).repeat_interleave(each)  # [V]
    tile = (torch.arange(views, device=tiles.device) - (each.cumsum(0) - each)[image] - 1)[:, None]  # -1: the whole
    across = cols[image, None].clamp_min(1) if spatial else torch.ones_like(tile)
    place = torch.arange(grid[0] * grid[1], device=tiles.device)
    down, along = place // grid[1] + tile // across * grid[0], place % grid[1] + tile % across * grid[1]  # [V,T]
    whole = tile < 0
    row = torch.where(whole, place // grid[1], grid[0] + down)
    col = torch.where(whole, place % grid[1], along)
    real = torch.ones_like(row, dtype=torch.bool)
    if spatial:
        top, left = (margin[image, None] for margin in _margins(tiles, grid))
        inside = (down >= top) & (down < rows[image, None] * grid[0] - top)
        inside &= (along >= left) & (along < cols[image, None] * grid[1] - left)
        real = whole | inside
    size = torch.zeros_like(rows).scatter_add(0, image, real.sum(1))
    columns = int(col.max()) + 1
    key = ((image[:, None] * (int(row.max()) + 1) + row) * columns + col).flatten()
    order = key.argsort()
    nth = (
        torch.empty_like(order).index_put((order,), real.flatten()[order].long().cumsum(0) - 1).unflatten(0, row.shape)
    )
    number = nth - (size.cumsum(0) - size)[image, None]
    return TileTable(image, row, col, real, number, size, columns)


def shape_table(grids: Int[Tensor, "images 2"]) -> TileTable:
    """The table of images of one view each that have their own grids (rows and columns), padded to the longest."""
    size = grids.prod(1)
    number = torch.arange(int(size.max()), device=grids.device).expand(len(grids), -1)  # [N,T]
    columns = grids[:, 1:]
    real = number < size[:, None]
    row, col = ((place * real) for place in (number // columns, number % columns))
    image = torch.arange(len(grids), device=grids.device)
    return TileTable(image, row, col, real, number, size, int(grids[:, 1].max()))


def _margins(tiles: Int[Tensor, "images 4"], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows above and columns left of the picture in the joined grid of tiles: as many below and right of it."""
    rows, cols, height, width = tiles.clamp_min(1).unbind(1)
    reached = (height * cols * grid[0] // width).clamp_min(1), (width * rows * grid[1] // height).clamp_min(1)
    return tuple(  # type: ignore[return-value]
        (total - part.minimum(total)) // 2
        for total, part in zip((rows * grid[0], cols * grid[1]), reached, strict=True)
    )
