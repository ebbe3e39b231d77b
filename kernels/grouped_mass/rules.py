"""Rules of grouped-mass attention: from the mass of each key group to a coefficient per group.

A rule sees ``mass [B,H,Q,G]`` (how much attention each group got in each row; sums to 1 over G) and
``rows [B,Q]`` (where it may act) and returns ``coefficient [B,H,Q,G]`` with which each group's share of the
output is multiplied. 1 everywhere leaves attention as it was.

Any callable with ``groups`` is a rule. The classes of this file are those that a fused kernel knows in closed form;
every other one runs between the two passes of :mod:`vlm.kernels.grouped_mass.two_pass`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Groups by convention; 4 and above are free for a method's own use.
TEXT, VISUAL, VISUAL_SINK, TEXT_SINK = 0, 1, 2, 3
MOST_GROUPS = 8
LEAST_MASS = 1e-6  # a group with less mass than this is not scaled up: its share is rounding


class Rule(Protocol):
    """``groups`` is the number of key groups the rule tells apart, at most 8."""

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


@dataclass(frozen=True, eq=False)
class Static:
    """The same coefficients in every selected row: amplify or silence groups after the softmax.

    ``gains`` is [groups] or, for gains that differ by head, [heads, groups]. With ``renormalise`` the weights of a
    row sum to one again, which equals adding log gain to the scores of the group (ZeroTuning, ICLR 2026); adds_logs:
    that form may be used, as no group is silenced and gains are not learned.
    """

    gains: Tensor
    renormalise: bool = False
    adds_logs: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.gains.ndim not in (1, 2):
            raise ValueError(f"Static: gains must be [groups] or [heads, groups]; found {tuple(self.gains.shape)}")
        logs = self.renormalise and not self.gains.requires_grad and bool((self.gains > 0).all())
        object.__setattr__(self, "adds_logs", logs)  # now: at a decoding step looking would wait for the device

    @staticmethod
    def of(gains: Sequence[float] | Sequence[Sequence[float]], renormalise: bool = False) -> "Static":
        return Static(torch.tensor(gains), renormalise)

    @property
    def groups(self) -> int:
        return self.gains.shape[-1]

    def __call__(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: Bool[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows groups"]:
        gain = self.gains.to(mass)
        if gain.ndim == 2:
            if len(gain) not in (1, mass.shape[1]):
                raise ValueError(f"Static: gains must have 1 or {mass.shape[1]} heads; found {len(gain)}")
            gain = gain[None, :, None, :]  # [1,H,1,G]
        if self.renormalise:
            total = (gain * mass).sum(-1, keepdim=True)  # [B,H,Q,1], 0 in a row that sees nothing
            gain = gain / torch.where(total > 0, total, 1)
        return torch.where(rows[:, None, :, None], gain.expand(mass.shape), 1.0)


@dataclass(frozen=True)
class Redistribution:
    """Move a part of the mass of some groups to others, in proportion to what each key there has already.

    In a selected row the ``source`` groups keep ``1 - taken`` of their mass and the ``target`` groups get the rest;
    a row keeps its total. It acts only where the ``watched`` groups together have at least ``watched_min``, the
    target has at least ``target_share`` of that, and the ``needed`` groups (the source, if empty) have any mass.
    Where it starts to act is a step: no gradient flows through the decision.
    """

    taken: float
    source: tuple[int, ...]
    target: tuple[int, ...]
    watched: tuple[int, ...] = ()
    needed: tuple[int, ...] = ()
    watched_min: float = 0.0
    target_share: float = 0.0
    groups: int = 4

    def __post_init__(self) -> None:
        named = {*self.source, *self.target, *self.watched, *self.needed}
        if not named <= set(range(self.groups)):
            raise ValueError(f"Redistribution: groups must be 0..{self.groups - 1}; found {sorted(named)}")
        if not self.target or set(self.source) & set(self.target):
            raise ValueError(
                "Redistribution: source and target must share no group, and target must not be empty; "
                f"found {self.source}, {self.target}"
            )
        if not 0 <= self.taken <= 1:
            raise ValueError(f"Redistribution: taken must be 0..1; found {self.taken}")

    def __call__(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: Bool[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows groups"]:
        table = _table(self, mass.dtype, mass.device)
        sums = (mass[..., None, :] * table.terms).sum(-1)  # [B,H,Q,5]; no product of matrices, which may be rounded
        acts = (sums[..., :4] > table.limits).all(-1) & rows[:, None, :]
        gain = sums[..., 4] / sums[..., 1].clamp_min(LEAST_MASS)
        return torch.where(acts[..., None], torch.addcmul(table.kept, gain[..., None], table.target), 1.0)


class _Table(NamedTuple):
    """A redistribution as a few operations on all groups at once: at a decoding step their number is what costs.

    terms: rows of factors whose sums over the groups are the needed mass, the target's, the watched, what the target
    has beyond its share of that, and what moves. The first four must exceed ``limits``. kept: what stays of each group;
    target: 1 where what moves goes.
    """

    terms: Float[Tensor, "5 groups"]
    limits: Float[Tensor, "4"]
    kept: Float[Tensor, " groups"]
    target: Float[Tensor, " groups"]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table made while decoding serves training too
def _table(rule: Redistribution, dtype: torch.dtype, device: torch.device) -> _Table:
    def marks(groups: tuple[int, ...]) -> Tensor:
        return torch.tensor([float(g in groups) for g in range(rule.groups)], dtype=torch.float64)

    needed, target, watched = marks(rule.needed or rule.source), marks(rule.target), marks(rule.watched)
    taken = rule.taken * marks(rule.source)
    terms = torch.stack([needed, target, watched, target - rule.target_share * watched, taken])
    least = torch.tensor([0.0, LEAST_MASS, rule.watched_min, 0.0], dtype=torch.float64).to(dtype)
    below = torch.nextafter(least, torch.full_like(least, -torch.inf))  # exceeded by the limit itself
    limits = torch.where(torch.tensor([False, False, True, True]), below, least)
    return _Table(*(x.to(device=device, dtype=dtype) for x in (terms, limits, 1 - taken, target)))


def visual_redistribution(taken: float = 0.6, rho: float = 0.5, image_min: float = 0.2) -> Redistribution:
    """VAR: move a part of the attention that sinks attract to the other visual tokens.

    Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (ICLR 2025), section 5.
    A row of a head acts when the image gets at least ``image_min`` of its attention and at least ``rho`` of that
    goes to visual tokens that are no sinks. Then ``taken`` of the mass of all sinks moves to the other visual tokens
    in proportion. No visual sink in a layer means nothing to correct there.
    """
    image = (VISUAL, VISUAL_SINK)
    return Redistribution(taken, (VISUAL_SINK, TEXT_SINK), (VISUAL,), image, (VISUAL_SINK,), image_min, rho)


def sink_calibration(beta: float = 0.4, sink: int = 1, groups: int = 2) -> Redistribution:
    """ACT: sinks other than the first token keep ``beta`` of their mass; every other key gets its part of the rest.

    Source: "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024), section 4.
    """
    rest = tuple(g for g in range(groups) if g != sink)
    return Redistribution(1 - beta, (sink,), rest, groups=groups)


@dataclass(frozen=True)
class MassFloor:
    """Guarantee one group at least ``least`` of each selected row's mass; the others shrink in proportion.

    Where the group has less, its coefficient is least / mass, at most ``most``. Ours: no publication.
    """

    least: float
    group: int = VISUAL
    most: float = 1e4
    groups: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.group < self.groups:
            raise ValueError(f"MassFloor: group must be 0..{self.groups - 1}; found {self.group}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"MassFloor: least must be 0..1; found {self.least}")

    def __call__(
        self, mass: Float[Tensor, "batch heads rows groups"], rows: Bool[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows groups"]:
        have = mass[..., self.group]
        acts = (have > LEAST_MASS) & (have < self.least) & rows[:, None, :]
        gain = torch.where(acts, (self.least / have.clamp_min(LEAST_MASS)).clamp_max(self.most), torch.ones_like(have))
        # 1 - have is not 0 here: have < least <= 1
        others = torch.where(acts, (1 - gain * have) / (1 - torch.where(acts, have, 0)), torch.ones_like(have))
        by_group = [gain if group == self.group else others for group in range(self.groups)]
        return torch.stack(by_group, -1)
