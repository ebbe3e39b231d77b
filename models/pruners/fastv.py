"""FastV: An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import Position, Program, cut, llm_before
from vlm.models.program.select import attention_from_last_row
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Fastv:
    """The visual tokens that the last prompt token attends to most in layer ``layer - 1``, kept from ``layer`` on.

    In training the tokens before each answer are asked, and their attention averaged.

    layer: the cut is at the input of this decoder layer (the paper's K = 2; its demo uses 3). The code's K = 0, a
    random choice before the first layer, is the pruner ``random``. debias: take the bias for late places out of the
    attention, by a sigma or ``fastv`` (arXiv 2508.17807). Position ids and the cache of earlier layers stay.
    """

    source: ClassVar[str] = "FastV (ECCV 2024), section 4.1"
    verified: ClassVar[str] = "code"

    keep: Budget
    layer: int = 2
    debias: Debias | None = None
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        selector = attention_from_last_row(self.layer - 1, self.debias)
        return cut(facts, llm_before(self.layer), self.keep, selector, self.position)
