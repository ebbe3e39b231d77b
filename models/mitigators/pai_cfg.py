"""The guidance half of PAI: Paying More Attention to Image (ECCV 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.program.contexts import NoImage
from vlm.models.program.contrast import contrast, wide
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Paicfg:
    """Classifier-free guidance by the image: log-probabilities move away from those without it.

        s* = gamma (s - u) + u,  tokens with p < cut * max p ruled out

    gamma: 1 changes nothing; 1.1 is the paper's for POPE and captions. cut: share of the likeliest token's probability.
    """

    source: ClassVar[str] = "PAI (ECCV 2024), section 3.3 and official code"
    verified: ClassVar[str] = "code; under beams the second stream follows the beams, which the code forgets"

    gamma: float = 1.1
    cut: float = 0.1

    def program(self, facts: Facts) -> Program:
        return () if self.gamma == 1 else ((LOGITS, Rewrite(self.logits, (NoImage(),))),)

    def logits(self, now: Now) -> Float[Tensor, "rows vocab"]:
        with_image, without = wide(now.main).log_softmax(-1), wide(now.other(NoImage())).log_softmax(-1)
        return contrast(with_image, without, self.gamma - 1, self.cut)
