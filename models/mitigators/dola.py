"""DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models (ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.contrast import combine, keep_only, most_divergent, plausible, wide
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Dola:
    """The final distribution is contrasted with that of an earlier layer, the one that differs most.

        s* = log p(final) - log p(M),  M = argmax JSD(p(final), p(layer)),  tokens with p < cut * max p ruled out

    M is chosen for each row and token; the released code chooses one for the whole batch.

    layers: after how many decoder layers a candidate is read (0: the embeddings), or every second of the ``low`` or the
        ``high`` half; in models deeper than 40 of the first or last 20. cut: relative top of the code (a token that is
        ruled out gets -inf, not -1000). norm: read layers through the final norm, as the port in Transformers does; the
        original reads them raw. tied: the head is the table of embeddings, so that the embeddings' own prediction is
        the token itself; ``low`` then begins after 2 layers.
    """

    source: ClassVar[str] = "DoLa (ICLR 2024), section 2 and official code"
    verified: ClassVar[str] = "code"

    layers: Literal["low", "high"] | tuple[int, ...] = "low"
    cut: float = 0.1
    norm: bool = True
    tied: bool = False

    def program(self, facts: Facts) -> Program:
        layers = self.candidates(facts.layers)
        return ((LOGITS, Rewrite(lambda now: self.logits(now, layers), inner=layers)),)

    def candidates(self, depth: int) -> tuple[int, ...]:
        """After how many layers a model of ``depth`` layers is read. Raises ModelError when there is nothing to read
        before the last layer."""
        half, far = (depth // 2, 20) if depth <= 40 else (20, 20)
        if self.layers == "low":
            found = tuple(range(2 if self.tied and half > 2 else 0, half, 2))
        elif self.layers == "high":
            found = tuple(range(depth - far if depth > 40 else half, depth, 2))
        else:
            found = tuple(int(layer) for layer in self.layers)
        if not found or not all(0 <= layer < depth for layer in found):
            raise ModelError(f"dola.layers: expected numbers of layers from 0 to {depth - 1}; found {list(found)}")
        return found

    def logits(self, now: Now, layers: tuple[int, ...]) -> Float[Tensor, "rows vocab"]:
        final = wide(now.main).log_softmax(-1)
        early = most_divergent(final, [now.inner(layer, self.norm) for layer in layers])
        return keep_only(combine(final, early, -1.0), plausible(final, self.cut))
