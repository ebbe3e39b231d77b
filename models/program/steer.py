"""Steering: directions in the residual stream, and how what an MLP adds is turned toward them (VISTA, VTI)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.program.observe import resting
from vlm.models.program.perturb import masked, pixel_seed
from vlm.models.program.prompts import last_place
from vlm.models.program.segments import unit

TINY = 1e-12  # the shortest vector that has a direction


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


def text_change(
    model: Any, inputs: Any, right: Sequence[str], wrong: Sequence[str]
) -> Float[Tensor, "batch layers width"]:
    """How the states of the last token of prompt and answer differ between a right answer and a made-up one. Takes two
    passes. Source: VTI (arXiv 2410.15778), section 4.2."""
    end = last_place(inputs.valid)
    states = [
        last_states(model, inputs.edit([list(model.tokenize(t)) for t in texts], end)) for texts in (right, wrong)
    ]
    return states[0] - states[1]


@torch.no_grad()
def block_states(model: Any, inputs: Any) -> Float[Tensor, "views blocks tokens width"]:
    """What leaves each block of the vision encoder, in a pass of the bare model. Raises ModelError for blocks whose
    states are no [views, tokens, width], the same in all."""
    found: list[Tensor] = []

    def keep(block: nn.Module, args: tuple, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in model.vision.blocks]
    try:
        with resting(model):
            model._enter(inputs, None)
    finally:
        for handle in handles:
            handle.remove()
    shapes = {tuple(states.shape) for states in found}
    if len(shapes) != 1 or found[0].ndim != 3:
        raise ModelError(f"vit.resid: expected blocks that all hand on [views, tokens, width]; found {sorted(shapes)}")
    return torch.stack(found, 1)


def masking_change(model: Any, inputs: Any, ratio: float, masks: int) -> Float[Tensor, "views blocks tokens width"]:
    """How the encoder's states, averaged over ``masks`` copies of each picture of which that share of the patches is
    blank, differ from those of the picture. Which patches goes by the picture's own pixels, drawn on the CPU.

    Source: VTI (arXiv 2410.15778), section 4.1.
    """
    rows, cols = model.vision.grid
    shown = rows * cols - round(ratio * rows * cols)
    total = -masks * block_states(model, inputs)
    for mask in range(masks):

        def blank(pixels: Tensor, number: int, mask: int = mask) -> Tensor:
            draw = torch.Generator().manual_seed(int(pixel_seed(pixels[None])) + 7919 * mask)
            kept = torch.zeros(rows * cols, dtype=torch.bool)
            kept[torch.randperm(rows * cols, generator=draw)[:shown]] = True
            return masked(pixels, kept.view(rows, cols).to(pixels.device))

        total += block_states(model, model.map_pixels(inputs, blank))
    return total / masks


def principal(changes: Float[Tensor, "samples places width"]) -> Float[Tensor, "places width"]:
    """The mean change in each place plus the first principal component, of length 1 and turned toward the mean (which
    side a component points to says nothing); without it where samples do not differ.

    Source: official code of VTI, where the component's side is what its decomposition happens to give.
    """
    wide = changes.double()
    mean = wide.mean(0)
    centred = (wide - mean).transpose(0, 1)  # [places, samples, width]
    # of the samples' products: they are few, the width is not
    length, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))
    first = (vectors[:, :, -1:].transpose(1, 2) @ centred)[:, 0]  # [places, width]
    first = unit(first) * (length[:, -1:] > 1e-12 * wide.square().sum((0, 2))[:, None])
    side = torch.where((first * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (mean + side * first).to(changes.dtype)


class Toward(NamedTuple):
    """A direction of each row. unit: of length one, or zero. there: where it is not zero; None: everywhere."""

    unit: Float[Tensor, "#batch 1 width"]
    there: Bool[Tensor, "#batch 1 1"] | None

    @classmethod
    def of(cls, direction: Float[Tensor, "#batch width"]) -> "Toward":
        return cls(unit(direction)[:, None], (direction != 0).any(-1)[:, None, None])

    @classmethod
    def lasting(cls, direction: Float[Tensor, "#batch width"]) -> "Toward":
        """The same for a whole answer: whether all rows have a direction is looked up, which waits for the device."""
        toward = cls.of(direction)
        return toward._replace(there=None) if bool((direction != 0).any(-1).all()) else toward


def turned(
    x: Float[Tensor, "batch rows width"],
    direction: Float[Tensor, "#batch width"] | Toward,
    by: float,
    more_when_opposed: bool = False,
) -> Float[Tensor, "batch rows width"]:
    """``|x| normalize(x / |x| + y)`` with y of length ``by`` along the direction; a direction of zero changes nothing.

    more_when_opposed: y is longer by the factor ``1 + max(0, -cos(x, direction))``. At least in single precision.
    Source: official codes of VISTA (with the factor) and VTI (without).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    toward = direction if isinstance(direction, Toward) else Toward.of(direction.to(wide))
    old, step = x.to(wide), toward.unit.to(wide)  # [B,R,W], [B,1,W]
    length = torch.linalg.vector_norm(old, dim=-1, keepdim=True)
    own = old / length.clamp_min(TINY)
    if more_when_opposed:
        cosine = (own * step).sum(-1, keepdim=True)
        own = torch.addcmul(own, step, by - by * cosine.clamp_max(0))
    else:
        own = own.add(step, alpha=by)
    new = own * (length / torch.linalg.vector_norm(own, dim=-1, keepdim=True).clamp_min(TINY))
    return (new if toward.there is None else torch.where(toward.there, new, old)).to(x.dtype)
