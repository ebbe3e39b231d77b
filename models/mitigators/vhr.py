"""VHR: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (ACL 2025)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.head_divergence import image_gains
from vlm.models.program.persample import PerSample
from vlm.models.program.program import Gate, Keys, Program, heads
from vlm.models.program.rescore import share
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Vhr:
    """Heads whose output the image changes most speak louder, from the prompt's last token on.

    A head's divergence is the length of the difference of its outputs at the prompt's last token with and without the
    image, where earlier layers speak louder already. Heads above their layer's median are multiplied by ``gain``. They
    are chosen once for each sample, in one pass before the answer, and stay.

    gain: alpha of the paper; 4 destroys text. outliers: heads that say more without the image, far above the mean
        divergence, are silenced; with gain 1 and without this nothing changes. layers: numbers from 0; without, layer 1
        and those that lie where the last 14 of 32 lie.
    """

    source: ClassVar[str] = "VHR (ACL 2025), section 4; layers from a runner of the official code"
    verified: ClassVar[str] = "paper; the threshold of the outliers and rows of the prompt: reconstruction"

    gain: float = 2.0
    outliers: bool = True
    layers: tuple[int, ...] | None = None

    def program(self, facts: Facts) -> Program:
        late = {min(1, facts.layers - 1), *share(facts, "vhr", None, 18, 31)}
        layers = sorted(late if self.layers is None else set(self.layers))
        if wrong := [layer for layer in layers if not 0 <= layer < facts.layers]:
            raise ModelError(f"vhr.layers: expected layers of 0..{facts.layers - 1}; found {wrong[0]}")
        if (self.gain == 1 and not self.outliers) or not layers:
            return ()
        options = (layers, self.gain, self.outliers)
        gains = PerSample(scores=lambda model, inputs, weights: image_gains(model, inputs, *options))
        return tuple((heads(layer), Gate(partial(self._of, gains, layer), (gains,))) for layer in layers)

    def _of(self, gains: PerSample, layer: int, keys: Keys) -> Float[Tensor, "batch heads"]:
        return keys.signal(gains)[:, layer]
