"""NATTEN (Hassani et al.; MIT), where it is installed with its CUDA kernels: neighborhood attention without biases.

Called as its 0.21 documents: tokens in their grid and heads last, ``kernel_size`` for window, ``additional_keys`` and
``additional_values`` for the keys that every query sees. Never run with its CUDA kernels here; its FlexAttention
backend agrees with the reference.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vlm.kernels.dispatch import Call
from vlm.kernels.neighborhood.reference import Neighborhood, Result
from vlm.kernels.neighborhood.window import Axis
from vlm.kernels.visibility import Operands

OLDEST = (0, 21, 7)  # before, its backward could give nan and its offsets overflow (its changelog)


def neighborhood_natten(x: Operands, n: Neighborhood) -> Result:
    assert x.v is not None
    shape = tuple(axis.length for axis in n.axes)
    in_grid = lambda y: x.per_head(y).transpose(1, 2).unflatten(1, shape).contiguous()  # noqa: E731
    extra: dict[str, Tensor] = {}
    if n.extra_k is not None and n.extra_v is not None:
        extra["additional_keys"] = x.per_head(n.extra_k).transpose(1, 2).contiguous()
        extra["additional_values"] = x.per_head(n.extra_v).transpose(1, 2).contiguous()
    call: Any = getattr(import_module("natten"), f"na{len(n.axes)}d")
    out, lse = call(
        x.q.transpose(1, 2).unflatten(1, shape).contiguous(),
        in_grid(x.k),
        in_grid(x.v),
        kernel_size=tuple(axis.window for axis in n.axes),
        stride=tuple(axis.stride for axis in n.axes),
        dilation=tuple(axis.dilation for axis in n.axes),
        is_causal=tuple(axis.causal for axis in n.axes),
        scale=x.scale,
        return_lse=True,
        **extra,
    )
    last = len(n.axes)
    return out.flatten(1, last).transpose(1, 2), lse.flatten(1, last).transpose(1, 2) if n.return_lse else None


def needs_natten(call: Call) -> str | None:
    """Why NATTEN cannot run a call, or None."""
    if find_spec("natten") is None:
        return "natten is not installed"
    if call.device.type != "cuda":
        return f"natten's kernels need a CUDA device; found {call.device.type}"
    found = version("natten")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit()) < OLDEST:
        return f"natten {'.'.join(map(str, OLDEST))} or newer; found {found}"
    if not getattr(import_module("natten"), "HAS_LIBNATTEN", False):
        return "natten was installed without libnatten, its CUDA kernels"
    if call.dtype == torch.float64 or call.dim % 8 or call.value_dim % 8:
        return f"natten's kernels take head dims that are multiples of 8 and no fp64; found {call.dim}, {call.dtype}"
    return natten_lacks(call)


def natten_lacks(call: Call) -> str | None:
    """What a call asks for that NATTEN has not, or None."""
    n = call.more.get("neighborhood")
    if n is None:
        return None
    if n.bias is not None or n.extra_bias is not None:
        return "natten has no biases since 0.20"
    if any(_clipped(axis) for axis in n.axes):
        return "natten shifts windows at the border and never clips them"
    if any(axis.window < 2 for axis in n.axes):
        return "natten's windows are 2 or more"
    if n.return_lse and call.grad:
        return "natten gives no gradient of the log-sum-exp"
    if call.more["scale"] == 0:
        return "natten takes a scale of 0 as none given"
    return None


def _clipped(axis: Axis) -> bool:
    return axis.clip and not axis.causal
