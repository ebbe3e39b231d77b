"""The keys of a decoder layer as the ops inside the layer see them, and what need not be found again at every token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.layout import Layout
from vlm.models.program.signals import Signal

AHEAD = 64  # generated tokens for which values of keys are laid out at once


class Keys(NamedTuple):
    """What an op inside a layer sees: the layout of the layer's keys and the signals it asked for, as the prompt gave
    them; tokens generated since have 0.

    memo: what is known of these keys while an answer grows, shared by the layers that work on the same sequence; None
    in a prompt's pass. Names in it are to tell methods and their options apart.
    """

    layout: Layout
    signal: Callable[[Signal], Tensor]
    memo: dict[Any, Any] | None = None

    def lasting(self, name: Any, make: Callable[[], Any]) -> Any:
        """``make()``, which stays the same while an answer grows and is asked once for it. Tensors in it have the batch
        first; anything else must hold of any rows of the batch."""
        if self.memo is None:
            return make()
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    def grown(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """``make()`` [batch, ..., keys], asked once for an answer, at its first token: tokens generated later get what
        that one has, and keys of the prompt keep theirs."""
        if self.memo is None:
            return make()
        length = self.layout.role.shape[1]
        known: Tensor | None = self.memo.get(name)
        if known is None or known.shape[-1] < length:
            known = make() if known is None else known
            known = torch.cat([known, known[..., -1:].expand(*known.shape[:-1], AHEAD)], -1)
            self.memo[name] = known
        return known[..., :length]

    @property
    def visual(self) -> Bool[Tensor, "batch keys"]:
        """Which keys are visual tokens."""
        return self.grown("visual", lambda: self.layout.visual)

    @property
    def question(self) -> Bool[Tensor, "batch keys"]:
        """The prompt's text after the last image; generated tokens are no part of it. None of a sample without one."""
        return self.grown("question", self._question)

    def _question(self) -> Bool[Tensor, "batch keys"]:
        layout = self.layout
        after = layout.last(layout.visual)[:, None]
        place = torch.arange(layout.role.shape[1], device=layout.role.device)
        return layout.valid & (layout.source >= 0) & (after >= 0) & (place > after)
