"""Images that come whole and in tiles (LLaVA-NeXT), or in their own shapes: what tokens show, and which are padding."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.splice import Visual


class Lines(NamedTuple):
    """The newline tokens that end the rows of joined tiles (LLaVA-NeXT): each one's image, and its place and number
    there."""

    image: Int[Tensor, " lines"]
    row: Int[Tensor, " lines"]
    col: Int[Tensor, " lines"]
    number: Int[Tensor, " lines"]


class TileTable(NamedTuple):
    """What the views of a batch of tiled images are: those of one image follow each other, the whole image first.

    image: the image that each view shows. row, col: places of its tokens in the image's grid, in which the tiles,
    joined to one picture, stand below the whole image. real: tokens that show some of the picture. number: a real
    token's number in its image, counted row by row. size: real tokens of each image. columns: of the widest grid.
    lines: newlines behind the rows of tiles, which numbers and sizes count too; None without.
    """

    image: Int[Tensor, " views"]
    row: Int[Tensor, "views tokens"]
    col: Int[Tensor, "views tokens"]
    real: Bool[Tensor, "views tokens"]
    number: Int[Tensor, "views tokens"]
    size: Int[Tensor, " images"]
    columns: int
    lines: Lines | None = None

    def sum_by_image(self, value: Int[Tensor, " views"]) -> Int[Tensor, " images"]:
        return torch.zeros_like(self.size).scatter_add(0, self.image, value)

    def join(
        self,
        features: Float[Tensor, "views kept width"],
        owner: Int[Tensor, " images"],
        place: Int[Tensor, "views kept"] | None = None,
        valid: Bool[Tensor, "views kept"] | None = None,
        whole: bool = False,
        newline: Float[Tensor, " width"] | None = None,
    ) -> Visual:
        """The views' tokens as those of images, each image's in the order of its grid, without padding.

        place, valid: what a cut left of each view's grid; all by default. newline: the token that ends rows of tiles,
        of those rows of which a token is left.
        """
        row, col, number, real = self.row, self.col, self.number, self.real
        if place is not None:
            row, col, number, real = (field.gather(1, place) for field in (row, col, number, real))
        real = real if valid is None else real & valid
        image = self.image[:, None].expand(number.shape)
        row, col, number, real, image = (field.flatten() for field in (row, col, number, real, image))
        values = features.flatten(0, 1)
        if newline is not None and self.lines is not None:
            rows = int(self.row.max()) + 1
            left = torch.zeros(len(self.size) * rows, dtype=torch.bool, device=real.device)
            left = left.index_put(((image * rows + row)[real],), left.new_ones(()))
            lines = [field[left[self.lines.image * rows + self.lines.row]] for field in self.lines]
            image, row, col, number = (torch.cat(p) for p in zip((image, row, col, number), lines, strict=True))
            real = torch.cat([real, real.new_ones(len(lines[0]))])
            values = torch.cat([values, newline.to(values.dtype).expand(len(lines[0]), -1)])
        counts = torch.zeros_like(self.size).scatter_add(0, image, real.long())
        longest = int(counts.max())
        key = (image * (int(self.size.max()) + 1) + number).masked_fill(~real, torch.iinfo(torch.long).max)
        order = key.argsort(stable=True)[: int(counts.sum())]  # real tokens, image by image
        at = image[order]
        column = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[at]
        index = order.new_zeros(len(counts), longest).index_put((at, column), order)
        width = torch.arange(longest, device=order.device)
        grid = (int(self.row.max()) + 1, self.columns)
        joined = Visual(
            values[index],
            grid,
            owner,
            (row * self.columns + col)[index],
            width < counts[:, None],
            whole,
        )
        joined.number, joined.size = number[index], self.size
        return joined


def tile_table(
    tiles: Int[Tensor, "images 4"], grid: tuple[int, int], spatial: bool, views: int, newline: bool = False
) -> TileTable:
    """The table of a batch whose image n has ``tiles[n]``: rows and columns of tiles, height and width of the picture.

    grid: of a view's tokens. spatial: whether a token's place says what it shows; if not, the tiles' grids stand one
    below the other and no token is taken for padding. newline: each row of the joined tiles ends with a newline.
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
    table = TileTable(image, row, col, real, number, size, columns)
    return _with_lines(table, grid[0]) if newline else table


def _with_lines(table: TileTable, first: int) -> TileTable:
    """The table with a newline behind every row of tiles, which begin with row ``first``, that has a real token."""
    rows = int(table.row.max()) + 1
    of_tile = table.real & (table.row >= first)
    place = (table.image[:, None] * rows + table.row)[of_tile]
    nothing = table.size.new_full((len(table.size) * rows,), -1)
    last, widest = (
        nothing.scatter_reduce(0, place, field[of_tile], "amax").unflatten(0, (-1, rows))  # [N,R]
        for field in (table.number, table.col)
    )
    there = last >= 0
    before = there.cumsum(1) - there.long()  # newlines of the rows above
    image, row = there.nonzero(as_tuple=True)
    lines = Lines(image, row, widest[there] + 1, last[there] + before[there] + 1)
    number = table.number + before[table.image[:, None], table.row]
    columns = max([table.columns, *(lines.col + 1).tolist()])
    return table._replace(number=number, size=table.size + there.sum(1), columns=columns, lines=lines)


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
