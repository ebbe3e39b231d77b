"""The window of a query along one axis, in integers: the one definition that every implementation tabulates.

Dilation d splits an axis into d groups, the coordinates equal modulo d. A group is a line of its own, whose members
are counted in steps; a query sees keys of its own group only. Stride s cuts the line into blocks of s queries, which
share the window of one of them, the leader. A window has w places, of which the key places are those the query sees:

    not causal   around the leader, the middle of the block (the right one of two): w // 2 places on its left and
                 (w - 1) // 2 on its right. ``shift`` moves the window inside the line, so that there are always w
                 keys; ``clip`` leaves it where it is and drops what lies outside.
    causal       the w places that end at the leader, the last of the block; dropped are those after the query and
                 those before the line. There is nothing to shift, so both borders are alike.

stride 1 is neighborhood attention, dilation above 1 dilated neighborhood attention (Hassani et al., CVPR 2023;
Hassani and Shi, 2022), stride = window blocked attention without overlap, what lies between generalized neighborhood
attention (Hassani et al., 2025). The formulas are those of NATTEN 0.21, ``clip`` is what TransNeXt (Shi, CVPR 2024)
and a padded convolution do.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

HIDDEN = -1  # in a table: this key is not seen, this place holds no key


class Axis(NamedTuple):
    """One axis of a grid and the window along it."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool
    clip: bool

    @property
    def offsets(self) -> int:
        """Entries of a relative bias table along this axis: key minus query is -(window - 1) .. window - 1 steps."""
        return 2 * self.window - 1


class Lines(NamedTuple):
    """What holds for each coordinate of an axis; counted in steps along the line of its group."""

    group: Int[Tensor, " length"]
    step: Int[Tensor, " length"]
    start: Int[Tensor, " length"]  # the first place of the window, which may lie outside the line
    first: Int[Tensor, " length"]  # the first and the last key that the query sees; all between are seen too
    last: Int[Tensor, " length"]


def lines(axis: Axis) -> Lines:
    """The window of every coordinate of an axis."""
    coordinate = torch.arange(axis.length)
    group, step = coordinate % axis.dilation, coordinate // axis.dilation
    end = (axis.length - 1 - group) // axis.dilation  # the last step of the group
    block = step // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(block + axis.stride - 1, end)
        start = leader - axis.window + 1
        return Lines(group, step, start, start.clamp_min(0), step)
    start = block + axis.stride // 2 - axis.window // 2
    if not axis.clip:
        start = torch.minimum(start.clamp_min(0), end - axis.window + 1)
    return Lines(group, step, start, start.clamp_min(0), torch.minimum(start + axis.window - 1, end))


def entries(axis: Axis, line: Lines, query: Tensor, key: Tensor) -> Tensor:
    """Entry of the bias table for each query and key coordinate (broadcast): their offset in steps + window - 1.

    HIDDEN where the query does not see the key.
    """
    step = line.step[key]
    seen = (line.group[query] == line.group[key]) & (line.first[query] <= step) & (step <= line.last[query])
    return torch.where(seen, step - line.step[query] + axis.window - 1, HIDDEN)


def grid(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """Tables of the axes -> one table of the grid they span, in raster order along each dimension.

    ``parts[a]`` holds indices below ``sizes[a]``; the index of a combination is the raster index of its parts, and
    HIDDEN where one of them is.
    """
    whole = parts[0]
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        shape = [a * b for a, b in zip(whole.shape, part.shape, strict=True)]
        for d in range(part.ndim):
            whole, part = whole.unsqueeze(2 * d + 1), part.unsqueeze(2 * d)
        hidden = (whole == HIDDEN) | (part == HIDDEN)
        whole = torch.where(hidden, HIDDEN, whole * size + part).reshape(shape)
    return whole
