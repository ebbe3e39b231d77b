"""Rules of grouped-mass attention: from the mass of each key group to a coefficient per group.

A rule sees ``mass [B,H,Q,G]`` (how much attention each group got in each row; sums to 1 over G) and
``rows [B,Q]`` (where it may act) and returns ``coefficient [B,H,Q,G]`` with which each group's share of the
output is multiplied. 1 everywhere leaves attention as it was.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Groups by convention; 4 and above are free for a method's own use.
TEXT, VISUAL, VISUAL_SINK, TEXT_SINK = 0, 1, 2, 3


class Rule(Protocol):
    """``groups`` is the number of key groups the rule tells apart."""

    @property
    def groups(self) -> int: ...

    def __call__(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: Bool[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows groups"]: ...


@dataclass(frozen=True)
class Neutral:
    """Plain attention; useful to read the masses of ``groups`` groups."""

    groups: int = 4

    def __call__(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: Bool[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows groups"]:
        return torch.ones_like(mass)


@dataclass(frozen=True)
class VisualRedistribution:
    """VAR: move a part of the attention that sinks attract to the other visual tokens.

    Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (ICLR 2025), section 5.
    A row of a head acts when the image gets at least ``image_min`` of its attention
    and at least ``rho`` of that goes to visual tokens that are no sinks. Then ``taken`` of the mass of all
    sinks moves to the other visual tokens in proportion. Mass is conserved, so rows still sum to one.
    """

    taken: float = 0.6
    rho: float = 0.5
    image_min: float = 0.2
    groups: int = 4

    def __call__(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: Bool[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows groups"]:
        visual, sinks = mass[..., VISUAL], mass[..., VISUAL_SINK] + mass[..., TEXT_SINK]
        image = visual + mass[..., VISUAL_SINK]
        # No visual sink in this layer means nothing to correct (spec: "select nothing there").
        acts = (image >= self.image_min) & (visual >= self.rho * image) & (mass[..., VISUAL_SINK] > 0)
        acts = acts & (visual > 1e-6) & rows[:, None, :]
        gain = 1 + self.taken * sinks / visual.clamp_min(1e-6)
        coefficient = torch.ones_like(mass)
        coefficient[..., VISUAL] = torch.where(acts, gain, torch.ones_like(gain))
        for sink in (VISUAL_SINK, TEXT_SINK):
            coefficient[..., sink].masked_fill_(acts, 1 - self.taken)
        return coefficient
