"""Keep tokens at even distances in raster order: the cheapest baseline."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.program import LLM_IN, Position, Program, cut
from vlm.models.program.select import even_stride
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Stride:
    """Every n/k-th visual token kept before the language model."""

    source: ClassVar[str] = "baseline"
    verified: ClassVar[str] = "definition"

    keep: Budget
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        return cut(facts, LLM_IN, self.keep, even_stride(), self.position)
