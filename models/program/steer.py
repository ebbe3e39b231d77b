"""Steering: directions in the residual stream, and how what an MLP adds is turned toward them (VISTA, VTI)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.program.observe import resting
from vlm.models.program.segments import unit


@torch.no_grad()
def last_states(model: Any, inputs: Any) -> Float[Tensor, "batch layers width"]:
    """What leaves each decoder layer at the last token of each prompt, in a pass of the bare model."""
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out)[:, -1])

    handles = [layer.register_forward_hook(keep) for layer in model.decoder.layers]
    try:
        with resting(model):
            model.prefill(inputs)  # rows padded on the left, so the last place is every row's last token
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found, 1)


def image_direction(model: Any, inputs: Any) -> Float[Tensor, "batch layers width"]:
    """How the last token's states differ from those of the prompt without its images; 0 for a row without any.

    Takes two passes. Source: VISTA (ICML 2025), section 4.1.
    """
    change = last_states(model, inputs) - last_states(model, inputs.without_images())
    shown = model.visual_counts(inputs) > 0
    return change * shown.to(change)[:, None, None]


def turned(
    x: Float[Tensor, "batch rows width"],
    direction: Float[Tensor, "#batch width"],
    by: float,
    more_when_opposed: bool = False,
) -> Float[Tensor, "batch rows width"]:
    """``|x| normalize(x / |x| + y)`` with y of length ``by`` along the direction; a direction of zero changes nothing.

    more_when_opposed: y is longer by the factor ``1 + max(0, -cos(x, direction))``. At least in single precision.
    Source: official codes of VISTA (with the factor) and VTI (without).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    toward, own = unit(direction)[:, None].to(wide), unit(x).to(wide)  # [B,1,W], [B,R,W]
    length = x.to(wide).norm(dim=-1, keepdim=True)
    step = by * toward
    if more_when_opposed:
        step = step * (1 - (own * toward).sum(-1, keepdim=True).clamp_max(0))
    there = (direction != 0).any(-1)[:, None, None]
    return torch.where(there, length * unit(own + step), x.to(wide)).to(x.dtype)
