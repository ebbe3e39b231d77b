"""PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction (CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import Position, Program, cuts, llm_before
from vlm.models.program.select import top_by
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Pyramiddrop:
    """Visual tokens dropped stage by stage inside the language model, by the attention of the rows that ask.

    Each stage ranks tokens by what the next layer would attend to from the last instruction token (in training: from
    the token before each answer).

    layers: where stages begin; by default after a quarter, a half and three quarters of the decoder (8, 16, 24 of 32).
    shares: what the stages keep in proportion to each other (0.5, 0.25, 0.125 of all in the paper); the budget scales
    them. debias: take the bias for late places out of the attention, by a sigma or ``fastv`` (arXiv 2508.17807).
    position: the code counts positions anew (``reindex``); ``keep`` is safer for grounding.
    """

    source: ClassVar[str] = "PyramidDrop (CVPR 2025), section 3.2; official code"
    verified: ClassVar[str] = "code"

    keep: Budget
    layers: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    debias: Debias | None = None
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        layers = self.layers or sorted({max(1, facts.layers * i // 4) for i in (1, 2, 3)})
        shares = self.shares or [0.5**i for i in range(1, len(layers) + 1)]
        at = [(llm_before(layer), top_by(Received(layer, ahead=True), self.debias)) for layer in layers]
        return cuts(facts, at, self.keep, self.position, shares)
