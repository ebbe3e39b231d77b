"""FastV: An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.program import Position, Program, cut, llm_before
from vlm.models.program.select import attention_from_last_row
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Fastv:
    """The visual tokens that the last prompt token attends to most in layer ``layer - 1``, kept from ``layer`` on.

    layer: the cut is at the input of this decoder layer (the paper's K = 2; its demo uses 3). Position ids and
    the cache of earlier layers stay.
    """

    source: ClassVar[str] = "FastV (ECCV 2024), section 4.1"
    verified: ClassVar[str] = "code"

    keep: Budget
    layer: int = 2
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        return cut(facts, llm_before(self.layer), self.keep, attention_from_last_row(self.layer - 1), self.position)
