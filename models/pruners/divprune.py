"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.program import LLM_IN, Position, Program, cut
from vlm.models.program.select import max_min_diversity
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Divprune:
    """The most diverse visual tokens, in the greedy max-min sense of cosine distance, before the language model.

    All images of a sample compete together, as in the paper. Its code counts positions anew after the cut
    (features are concatenated), hence the default ``position: reindex``.
    """

    source: ClassVar[str] = "DivPrune (CVPR 2025), algorithm 1"
    verified: ClassVar[str] = "golden"

    keep: Budget
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        return cut(facts, LLM_IN, self.keep, max_min_diversity(), self.position)
