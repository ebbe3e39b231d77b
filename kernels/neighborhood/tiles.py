"""Queries in boxes, each with the keys that any query of the box sees: small dense products, nothing gathered twice.

Neighbours share most of their keys. A box of queries with the union of their windows costs a few times the useful
products and holds a few copies of k and v; a window gathered for every query holds prod(window) copies.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from vlm.kernels.neighborhood.window import HIDDEN, Axis, entries, grid, lines
from vlm.kernels.plans import plan

ROWS = {1: 32, 2: 6, 3: 4}  # queries of a box along an axis, by number of axes: fastest on a CPU for windows 3 .. 128


class Tiles(NamedTuple):
    """The tokens of a grid by box: ``rows`` queries and ``columns`` keys each."""

    queries: Int[Tensor, "tiles rows"]  # tokens; a box that is not full repeats its last
    keys: Int[Tensor, "tiles columns"]  # tokens; likewise, and no row sees the repeated ones
    entries: Int[Tensor, "tiles rows columns"]  # of the bias table; HIDDEN where the row does not see the key
    places: Int[Tensor, "tiles rows window"]  # column of each place of the window; HIDDEN where it holds no key
    position: Int[Tensor, " tokens"]  # where among tiles x rows a token stands


@plan(Tiles, maxsize=32)
def tiles(axes: tuple[Axis, ...], device: torch.device) -> Tiles:
    """The boxes of a grid, kept for the next call."""
    axes = tuple(Axis(*axis) for axis in axes)  # a compiler hands over plain tuples
    each = [_along(axis, ROWS[len(axes)]) for axis in axes]
    lengths, columns = [axis.length for axis in axes], [x.keys.shape[1] for x in each]
    queries = grid([x.queries for x in each], lengths)
    position = torch.empty(int(queries.max()) + 1, dtype=torch.long)
    position[queries.flatten()] = torch.arange(queries.numel())
    whole = Tiles(
        queries,
        grid([x.keys for x in each], lengths),
        grid([x.entries for x in each], [axis.offsets for axis in axes]).int(),
        grid([x.places for x in each], columns),
        position,
    )
    return Tiles(*(x.to(device) for x in whole))


def _along(axis: Axis, target: int) -> Tiles:
    """The boxes of one axis: a run of queries of one line, and the keys from the first's first to the last's last."""
    line, rows = lines(axis), _rows(axis, target)
    runs = [
        run
        for group in range(min(axis.dilation, axis.length))
        for run in torch.arange(group, axis.length, axis.dilation).split(rows)
    ]
    queries = torch.stack([torch.cat([run, run[-1:].expand(rows - len(run))]) for run in runs])
    low, high = line.first[queries[:, :1]], line.last[queries[:, -1:]]  # [tiles, 1]; both rise along a line
    step = low + torch.arange(int((high - low).max()) + 1)  # [tiles, columns]
    keys = torch.minimum(step, high) * axis.dilation + line.group[queries[:, :1]]
    table = entries(axis, line, queries[:, :, None], keys[:, None, :])
    table = table.masked_fill((step > high)[:, None, :], HIDDEN)
    place = line.start[queries][:, :, None] + torch.arange(axis.window)  # [tiles, rows, window], in steps
    inside = (line.first[queries][:, :, None] <= place) & (place <= line.last[queries][:, :, None])
    places = torch.where(inside, place - low[:, :, None], HIDDEN)
    return Tiles(queries, keys, table, places, torch.empty(0, dtype=torch.long))


def _rows(axis: Axis, target: int) -> int:
    """About ``target`` queries, in runs of equal length; whole blocks of a stride, which share their keys."""
    members = -(-axis.length // axis.dilation)
    if axis.stride > 1:
        return min(axis.stride * max(1, target // axis.stride), members)
    return -(-members // max(1, round(members / target)))
