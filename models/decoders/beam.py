"""Beam search."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm.models.errors import ModelError
from vlm.models.program.search import BeamSearch, Prompts, Search


@dataclass(frozen=True)
class Beam:
    """The likeliest answer that a search with ``width`` hypotheses finds.

    length_penalty: a finished answer of n tokens is worth its log-probability over n to this power, so more favours
        long answers. early_stopping: true stops once ``width`` answers are finished; false also when the best
        unfinished one is worth less than they; never only when it cannot become better.
    """

    source: ClassVar[str] = "baseline; as Transformers' beam search"
    verified: ClassVar[str] = "token-identical to Transformers' generate"
    beams: ClassVar[bool] = True

    width: int = 5
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ModelError(f"beam.width: expected at least 1; found {self.width}")

    def begin(self, prompts: Prompts) -> Search:
        return BeamSearch(prompts, self.width, self.length_penalty, self.early_stopping)
