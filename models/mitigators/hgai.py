"""HGAI: Devils in Middle Layers of Large Vision-Language Models (CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.program.program import Keys, Program
from vlm.models.program.rescore import raised_together, rescore, share
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Hgai:
    """In the middle layers the newest token's heads look more at what they all look at in the image.

        z_hj + alpha mean over heads |z_j|,  j in the image, before the softmax

    alpha: 0 changes nothing. layers: first and last, counted from 0; without, those that lie where 5 to 18 lie in the
        32 layers of LLaVA-1.5-7B.
    """

    source: ClassVar[str] = "HGAI (CVPR 2025), section 4 and official code"
    verified: ClassVar[str] = "code by specification, numbers not reproduced; layers of other depths: ours"

    alpha: float = 0.5
    layers: tuple[int, int] | None = None

    def program(self, facts: Facts) -> Program:
        layers = share(facts, "hgai", self.layers, 5, 18)
        return rescore(layers, self.scores) if self.alpha else ()

    def scores(self, scores: Float[Tensor, "batch heads keys"], keys: Keys) -> Float[Tensor, "batch heads keys"]:
        return raised_together(scores, self.alpha, keys.visual)
