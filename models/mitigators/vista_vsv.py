"""The steering half of VISTA: The Hidden Life of Tokens (ICML 2025)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.program.persample import PerSample
from vlm.models.program.program import Edit, Keys, Program, resid
from vlm.models.program.signals import Facts
from vlm.models.program.steer import Toward, image_direction, turned


@dataclass(frozen=True)
class Vistavsv:
    """What each layer's MLP adds is turned toward what the image changes in the prompt's last token.

        x' = |x| normalize(x / |x| + strength (1 + max(0, -cos(x, v))) v / |v|)

    v is the state that leaves the layer with the image minus the one without, of each sample's own prompt; it takes two
    passes before the answer. All rows of the prompt and of the answer are turned, as in the code. The half on logits is
    the mitigator ``vista_sla``.

    strength: lambda of the paper; 0 changes nothing. 0.17 is for captions of LLaVA-1.5-7B (the author calls 0.1 to 0.15
        safer), 0.01 for POPE.
    """

    source: ClassVar[str] = "VISTA (ICML 2025), section 4.1 and official code"
    verified: ClassVar[str] = "code by specification, numbers not reproduced; its PCA of one difference is left out"

    strength: float = 0.17

    def program(self, facts: Facts) -> Program:
        vectors = PerSample(scores=lambda model, inputs, weights: image_direction(model, inputs))
        layers = range(facts.layers) if self.strength else ()
        return tuple((resid(layer), Edit(partial(self._turn, vectors, layer), (vectors,))) for layer in layers)

    def _turn(
        self, vectors: PerSample, layer: int, x: Float[Tensor, "batch rows width"], keys: Keys
    ) -> Float[Tensor, "batch rows width"]:
        direction = keys.signal(vectors)[:, layer]
        toward = direction if keys.memo is None else keys.lasting((vectors, layer), lambda: Toward.lasting(direction))
        return turned(x, toward, self.strength, more_when_opposed=True)
