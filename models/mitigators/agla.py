"""AGLA: Mitigating Object Hallucinations with Assembly of Global and Local Attention (CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.contexts import Masked
from vlm.models.program.contrast import combine, keep_only, plausible
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Agla:
    """The logits of an image of which only what the question is about is left are added to those of the whole image.

        l* = l(image) + alpha l(masked image),  tokens with p < cut * max p ruled out

    The mask is ours: the paper takes the gradient-weighted cross-attention of a second model (BLIP-ITM) and keeps a
    share 1 - s/2 of the pixels for an image-text similarity s; here the model's own attention from the question to the
    patches ranks them, a fixed share stays, and what is masked gets the mean colour instead of black.

    alpha: weight of the masked image (0 changes nothing). cut: beta of the paper. keep: share of patches that stay.
    layer: decoder layer whose attention ranks patches; the middle one by default.
    """

    source: ClassVar[str] = "AGLA (CVPR 2025), section 3 and official code"
    verified: ClassVar[str] = "combination: code; mask: reconstruction"

    alpha: float = 2.0
    cut: float = 0.5
    keep: float = 0.75
    layer: int | None = None

    def program(self, facts: Facts) -> Program:
        if self.alpha == 0:
            return ()
        if not 0 < self.keep < 1:
            raise ModelError(f"agla.keep: expected a share above 0 and below 1; found {self.keep:g}")
        masked = Masked(facts.layers // 2 if self.layer is None else self.layer, self.keep)

        def logits(now: Now) -> Float[Tensor, "rows vocab"]:
            return keep_only(combine(now.main, now.other(masked), self.alpha), plausible(now.main, self.cut))

        return ((LOGITS, Rewrite(logits, (masked,))),)
