"""Neighborhoods without an attention of their own: values summed with given weights, and a bias table read out."""

from math import prod
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from vlm.kernels.neighborhood.arguments import Windows, axes_of, flat_table
from vlm.kernels.neighborhood.tiles import Tiles, tiles
from vlm.kernels.neighborhood.window import HIDDEN


def neighborhood_aggregate(
    weights: Float[Tensor, "batch heads tokens places"],
    v: Float[Tensor, "batch heads tokens value_dim"],
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    **windows: Unpack[Windows],
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """out[i] = sum over the places t of i's window of weights[i, t] v[key at t].

    Dynamic depthwise convolution over a neighborhood: OverLoCK's ContMix (Lou and Yu, CVPR 2025), the value term of
    TransNeXt that stands outside its softmax (Shi, CVPR 2024).

    Args:
        weights: any numbers; places in raster order, prod(window) of them, as :mod:`.window` defines. A place that
            holds no key (outside the grid under ``border="clip"``, after the query when causal) counts nothing.
        shape, window, **windows: see :func:`~vlm.kernels.neighborhood.neighborhood_attention`.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    op = "neighborhood_aggregate"
    for name, x in (("weights", weights), ("v", v)):
        if x.ndim != 4 or not x.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating and have 4 dimensions; found {x.dtype}, {tuple(x.shape)}")
    axes = axes_of(op, v.shape[2], shape, window, windows)
    t = tiles(axes, v.device)
    expected = (*v.shape[:3], t.places.shape[2])
    if tuple(weights.shape) != expected or weights.dtype != v.dtype or weights.device != v.device:
        found = f"{tuple(weights.shape)}, {weights.dtype} on {weights.device}"
        raise ValueError(f"{op}: weights must be {expected}, {v.dtype} on {v.device}; found {found}")
    by_row = weights.index_select(2, t.queries.flatten()).unflatten(2, t.queries.shape)  # [B,H,T,R,W]
    by_row = by_row.masked_fill(t.places == HIDDEN, 0)
    at = t.places.clamp_min(0).expand(by_row.shape)
    by_column = by_row.new_zeros(*by_row.shape[:4], t.keys.shape[1]).scatter_add(4, at, by_row)  # [B,H,T,R,C]
    values = v.index_select(2, t.keys.flatten()).unflatten(2, t.keys.shape)  # [B,H,T,C,Dv]
    return (by_column @ values).flatten(2, 3).index_select(2, t.position)


def neighborhood_bias(
    bias: Float[Tensor, "heads *offsets"],
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    **windows: Unpack[Windows],
) -> Float[Tensor, "heads tokens places"]:
    """The bias of every place of every window, to be added to logits that :func:`neighborhood_aggregate` will use.

    Args:
        bias: relative bias table, [heads, 2 window - 1 of each axis].
        shape, window, **windows: see :func:`~vlm.kernels.neighborhood.neighborhood_attention`.

    Returns:
        [heads, tokens, prod(window)]; -inf at a place that holds no key, so that a softmax gives it nothing.

    Raises:
        ValueError: a bias or a window that does not fit.
    """
    op = "neighborhood_bias"
    axes = axes_of(op, prod(shape), shape, window, windows)
    table = flat_table(op, bias, bias.shape[0], axes, bias)
    entry = _entry_of_places(tiles(axes, bias.device))  # [N,W]
    read = table.index_select(1, entry.clamp_min(0).flatten()).unflatten(1, entry.shape)
    return read.masked_fill(entry == HIDDEN, float("-inf"))


def _entry_of_places(t: Tiles) -> Tensor:
    entry = t.entries.gather(2, t.places.clamp_min(0)).masked_fill(t.places == HIDDEN, HIDDEN)
    return entry.flatten(0, 1)[t.position]
