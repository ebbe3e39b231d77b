"""VCD: Mitigating Object Hallucinations through Visual Contrastive Decoding (CVPR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.program.contexts import Noised
from vlm.models.program.contrast import contrast
from vlm.models.program.perturb import signal_left
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Vcd:
    """What the image makes likelier than a noised image does becomes likelier still.

        l* = (1 + alpha) l(image) - alpha l(noised image),  tokens with p < cut * max p ruled out

    alpha: strength of the contrast (0 changes nothing). cut: beta of the paper; 0.1 is the default of its code, its
        script says 0.2. step: of 1000 of the diffusion (its tables have 500 and 999). seed: of the noise, which
        otherwise goes by the image's pixels. The paper samples at temperature 1 and compares with sampling.
    """

    source: ClassVar[str] = "VCD (CVPR 2024), section 3 and official code"
    verified: ClassVar[str] = "code; the noise itself is drawn by image: ours"

    alpha: float = 1.0
    cut: float = 0.1
    step: int = 500
    seed: int = 0

    def program(self, facts: Facts) -> Program:
        signal_left(self.step)  # refuses a step that does not exist
        return ((LOGITS, Rewrite(self.logits, (self.noised,))),) if self.alpha else ()

    @property
    def noised(self) -> Noised:
        return Noised(self.step, self.seed)

    def logits(self, now: Now) -> Float[Tensor, "rows vocab"]:
        return contrast(now.main, now.other(self.noised), self.alpha, self.cut)
