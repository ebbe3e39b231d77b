"""Keep a uniformly random subset: the baseline that several published methods lose to."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.program import LLM_IN, Position, Program, cut
from vlm.models.program.select import uniform_random
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Random:
    """Visual tokens kept at random before the language model.

    The choice depends on ``seed`` and the image's pixels, not on the batch.
    """

    source: ClassVar[str] = "baseline; UniPruneBench (arXiv 2511.02650)"
    verified: ClassVar[str] = "definition"

    keep: Budget
    seed: int = 0
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        return cut(facts, LLM_IN, self.keep, uniform_random(self.seed), self.position)
