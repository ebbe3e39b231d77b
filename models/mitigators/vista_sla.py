"""The self-logits half of VISTA: The Hidden Life of Tokens (ICML 2025)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.contrast import combine, wide
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Vistasla:
    """Self-logits augmentation: the mean logits of a window of late layers are mixed into the final ones.

        l* = (1 - gamma) l(final) + gamma mean over the window of head(state after the layer)

    gamma: share of the window (0 changes nothing). layers: first and last layer of the window, counted from 0; by
        default the six before the last one, which are 25 to 30 of 32. norm: read layers through the final norm; the
        released code does not.
    """

    source: ClassVar[str] = "VISTA (ICML 2025), section 4.2 and official code"
    verified: ClassVar[str] = "code; layers of models that are not 32 deep: ours"

    gamma: float = 0.3
    layers: tuple[int, int] | None = None
    norm: bool = False

    def program(self, facts: Facts) -> Program:
        first, last = self.layers or (max(0, facts.layers - 7), max(0, facts.layers - 2))
        if not 0 <= first <= last < facts.layers:
            raise ModelError(
                f"vista_sla.layers: expected first and last of 0..{facts.layers - 1}; found {first}, {last}"
            )
        after = tuple(layer + 1 for layer in range(first, last + 1))
        return ((LOGITS, Rewrite(lambda now: self.logits(now, after), inner=after)),) if self.gamma else ()

    def logits(self, now: Now, after: tuple[int, ...]) -> Float[Tensor, "rows vocab"]:
        window = torch.stack([wide(now.inner(layer, self.norm)) for layer in after]).mean(0)
        return combine(now.main, window, self.gamma, 1 - self.gamma)
