"""The attention half of PAI: Paying More Attention to Image (ECCV 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.program.program import Keys, Program
from vlm.models.program.rescore import from_second, raised, rescore
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Pai:
    """The newest token looks more at the image: its scores of visual tokens rise by a part of their size.

        z_j + alpha |z_j|,  j in the image, before the softmax

    In the row of the prompt's last token and of each generated one, in every head. The guidance by an image-free stream
    is the mitigator ``pai_cfg``, whose second stream has no image and so is not touched by this.

    alpha: 0 changes nothing; 0.2 is the code's, others run captions with 0.5. layers: first and last, counted from 0;
        all but the first two without.
    """

    source: ClassVar[str] = "PAI (ECCV 2024), section 3.2 and official code"
    verified: ClassVar[str] = "code by specification, numbers not reproduced"

    alpha: float = 0.2
    layers: tuple[int, int] | None = None

    def program(self, facts: Facts) -> Program:
        layers = from_second(facts, "pai", self.layers)
        return rescore(layers, self.scores) if self.alpha else ()

    def scores(self, scores: Float[Tensor, "batch heads keys"], keys: Keys) -> Float[Tensor, "batch heads keys"]:
        return raised(scores, keys.grown(self, lambda: self.alpha * keys.layout.visual[:, None]))
