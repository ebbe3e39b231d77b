"""DeCo: MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation (ICLR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.contrast import combine, keep_only, largest, nucleus, surest
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Deco:
    """A middle layer that is sure of a likely token has its logits added to the final ones.

        l* = l(final) + alpha p l(M) over the candidates C, others ruled out

    C are the ``top_k`` likeliest tokens within the nucleus ``top_p``; M is the layer that gives a token of C the
    largest probability p.

    alpha: strength (0 changes nothing, not even that others are ruled out). layers: first and last layer that is read,
        counted from 0; by default the share of a model's depth that 20 to 28 of 32 is.
    """

    source: ClassVar[str] = "DeCo (ICLR 2025), section 4 and official code"
    verified: ClassVar[str] = "code; layers of models that are not 32 deep: ours"

    alpha: float = 0.6
    top_k: int = 20
    top_p: float = 0.9
    layers: tuple[int, int] | None = None

    def program(self, facts: Facts) -> Program:
        first, last = self.layers or (facts.layers * 20 // 32, facts.layers * 28 // 32)
        if not 0 <= first <= last < facts.layers:
            raise ModelError(f"deco.layers: expected first and last of 0..{facts.layers - 1}; found {first}, {last}")
        after = tuple(layer + 1 for layer in range(first, last + 1))
        return ((LOGITS, Rewrite(lambda now: self.logits(now, after), inner=after)),) if self.alpha else ()

    def logits(self, now: Now, after: tuple[int, ...]) -> Float[Tensor, "rows vocab"]:
        candidates = largest(now.main, self.top_k) & nucleus(now.main, self.top_p)
        middle, probability = surest([now.inner(layer, True) for layer in after], candidates)
        return keep_only(combine(now.main, middle, self.alpha * probability), candidates)
