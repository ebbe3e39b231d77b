"""Regions of a picture: from a coarse map to connected pieces, their cut-out, and a picture of its size again."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def resized(grid: Float[Tensor, "rows cols"], size: tuple[int, int]) -> Float[Tensor, "height width"]:
    """A map of the picture's size, bilinear between the centres of the cells."""
    return torch.nn.functional.interpolate(grid[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def components(mask: Bool[Tensor, "height width"]) -> tuple[Int[Tensor, "height width"], int]:
    """Number of the piece that each pixel belongs to (0: none), pieces numbered in reading order of their first pixel,
    and how many there are. Pixels are joined over edges, not over corners."""
    height, width = mask.shape
    own = torch.arange(1, height * width + 1, device=mask.device).reshape(height, width)
    first = torch.where(mask, own, 0)
    while True:  # every pixel takes the smallest number it can see; whole runs at once, so few rounds are needed
        before = first
        for axis in (0, 1):
            first = _smallest_of_run(_smallest_of_run(first, mask, axis, False), mask, axis, True)
        if torch.equal(before, first):
            break
    names = first[mask].unique()  # sorted
    label = torch.searchsorted(names, first) + 1 if len(names) else torch.zeros_like(first)
    return torch.where(mask, label, 0), len(names)


def _smallest_of_run(value: Tensor, mask: Tensor, axis: int, backwards: bool) -> Tensor:
    """The smallest value so far along each run of the mask (a running minimum that begins anew after a gap)."""
    if backwards:
        return _smallest_of_run(value.flip(axis), mask.flip(axis), axis, False).flip(axis)
    # A later run must win over what came before it, so each gap lowers everything behind it.
    gaps, most = (~mask).long().cumsum(axis), value.numel() + 1
    value = value.masked_fill(~mask, most - 1)
    found = (value - gaps * most).cummin(axis).values + gaps * most
    return torch.where(mask, found, 0)


def keep_regions(scores: Float[Tensor, "height width"], top: float, count: int) -> Bool[Tensor, "height width"]:
    """The connected pieces of the ``top`` share of pixels that have the largest sums of scores.

    So many of them as ``count``, or the ``top`` share of all pieces where that is more. Source: CARVE (ECCV 2026),
    official code.
    """
    flat = scores.flatten().sort().values
    place = (1 - top) * (len(flat) - 1)  # the percentile, linear between two pixels
    low, high = flat[math.floor(place)], flat[math.ceil(place)]
    label, pieces = components(scores >= low + (high - low) * (place - math.floor(place)))
    mass = scores.new_zeros(pieces + 1).scatter_add(0, label.flatten(), scores.flatten())[1:]
    best = mass.argsort(descending=True, stable=True)[: max(count, int(pieces * top))] + 1
    return torch.isin(label, best)


def box_of(mask: Bool[Tensor, "height width"]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right (both exclusive) of what is marked; the whole of an empty mask."""
    if not bool(mask.any()):
        return 0, 0, mask.shape[0], mask.shape[1]
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1


def like_picture(box: tuple[int, int, int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """The smallest box around ``box``, within the picture, that has the picture's shape (as far as whole pixels go)."""
    top, left, bottom, right = box
    scale = max((bottom - top) / height, (right - left) / width)
    tall, wide = min(math.ceil(scale * height - 1e-9), height), min(math.ceil(scale * width - 1e-9), width)
    top = min(max((top + bottom - tall) // 2, 0), height - tall)
    left = min(max((left + right - wide) // 2, 0), width - wide)
    return top, left, top + tall, left + wide


def lanczos(
    pixels: Float[Tensor, "channels height width"], size: tuple[int, int]
) -> Float[Tensor, "channels tall wide"]:
    """The picture in another size, by a windowed sinc of three lobes, stretched where it gets smaller."""
    rows, cols = (_sinc_weights(old, new).to(pixels) for old, new in zip(pixels.shape[1:], size, strict=True))
    return rows @ pixels @ cols.T


def _sinc_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    ratio = old / new
    wide = max(ratio, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * ratio
    apart = (torch.arange(old, dtype=torch.float64) + 0.5 - centre[:, None]) / wide
    weights = torch.where(apart.abs() < 3, torch.sinc(apart) * torch.sinc(apart / 3), 0.0)
    return weights / weights.sum(1, keepdim=True)


def refined(
    pixels: Float[Tensor, "channels height width"], mask: Bool[Tensor, "height width"]
) -> Float[Tensor, "channels height width"]:
    """What is marked, cut out and enlarged to the size of the picture; what else the box holds is in the mean colour (0
    after normalisation)."""
    height, width = mask.shape
    top, left, bottom, right = like_picture(box_of(mask), height, width)
    shown = pixels * mask
    return lanczos(shown[:, top:bottom, left:right], (height, width))
