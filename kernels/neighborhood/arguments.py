"""The arguments that describe a grid and its windows, checked."""

from math import prod
from typing import Literal, TypedDict, TypeVar

from jaxtyping import Float
from torch import Tensor

from vlm.kernels.neighborhood.window import Axis

Border = Literal["shift", "clip"]
BORDERS = ("shift", "clip")
Value = TypeVar("Value", int, bool)


class Windows(TypedDict, total=False):
    """Keywords that place the windows; an int or bool counts for all axes. :mod:`.window` defines what they mean.

    stride: queries that share a window along an axis; 1 unless said otherwise, at most the window.
    dilation: steps between the keys of a window; 1 unless said otherwise.
    causal: whether keys stand not after the query along an axis; False unless said otherwise.
    border: ``"shift"`` keeps windows inside the grid, so that each has all its keys (unless causal); ``"clip"``
        leaves them centred and drops what lies outside. ``"shift"`` unless said otherwise.
    """

    stride: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    causal: bool | tuple[bool, ...]
    border: Border


def axes_of(
    op: str, tokens: int, shape: tuple[int, ...], window: int | tuple[int, ...], windows: Windows
) -> tuple[Axis, ...]:
    """The axes of a grid. Raises ValueError that names the operation, the argument, what was expected and found."""
    unknown = set(windows) - set(Windows.__annotations__)
    if unknown:
        known = ", ".join(Windows.__annotations__)
        raise TypeError(f"{op}: unknown keyword {sorted(unknown)[0]!r}; the keywords of windows are {known}")
    shape = tuple(shape)
    if len(shape) not in (1, 2, 3) or any(type(x) is not int or x < 1 for x in shape):
        raise ValueError(f"{op}: shape must be 1 to 3 integers of 1 or more; found {shape}")
    if prod(shape) != tokens:
        raise ValueError(f"{op}: shape must hold the {tokens} tokens of the tensors; found {shape}, {prod(shape)}")
    border = windows.get("border", "shift")
    if border not in BORDERS:
        raise ValueError(f"{op}: border must be one of {', '.join(BORDERS)}; found {border!r}")
    each = zip(
        shape,
        _per_axis(op, "window", window, int, len(shape)),
        _per_axis(op, "stride", windows.get("stride", 1), int, len(shape)),
        _per_axis(op, "dilation", windows.get("dilation", 1), int, len(shape)),
        _per_axis(op, "causal", windows.get("causal", False), bool, len(shape)),
        strict=True,
    )
    axes = tuple(Axis(*one, clip=border == "clip") for one in each)
    for number, axis in enumerate(axes):
        _check_fit(op, number, axis)
    return axes


def flat_table(op: str, bias: Tensor, heads: int, axes: tuple[Axis, ...], like: Tensor) -> Float[Tensor, "heads all"]:
    """A relative bias table with its axes in one, checked."""
    expected = (heads, *(axis.offsets for axis in axes))
    if tuple(bias.shape) != expected:
        raise ValueError(
            f"{op}: bias must be [heads, 2 window - 1 of each axis], {expected}; found {tuple(bias.shape)}"
        )
    if not bias.dtype.is_floating_point or bias.device != like.device:
        raise ValueError(f"{op}: bias must be floating and on {like.device}; found {bias.dtype} on {bias.device}")
    return bias.flatten(1)


def _per_axis(op: str, name: str, value: Value | tuple[Value, ...], kind: type[Value], axes: int) -> tuple[Value, ...]:
    """A value for each axis; integers are 1 or more, and a bool is no integer."""
    each = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(each) != axes or any(type(x) is not kind or (kind is int and x < 1) for x in each):
        wanted = "an integer of 1 or more" if kind is int else "a bool"
        raise ValueError(f"{op}: {name} must be {wanted}, or one for each of {axes} axes; found {value!r}")
    return each


def _check_fit(op: str, number: int, axis: Axis) -> None:
    if axis.stride > axis.window:
        wanted = f"at most the window of axis {number}, {axis.window}"
        raise ValueError(f"{op}: stride must be {wanted}; found {axis.stride}")
    if not axis.clip and axis.window * axis.dilation > axis.length:
        raise ValueError(
            f"{op}: window * dilation must be at most the length of axis {number}, {axis.length}, with border 'shift'; "
            f"found {axis.window} * {axis.dilation}"
        )
