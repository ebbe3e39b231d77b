"""Greedy decoding."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.search import Pick, Prompts, Search


@dataclass(frozen=True)
class Greedy:
    """The likeliest token at every step."""

    source: ClassVar[str] = "baseline"
    verified: ClassVar[str] = "definition; token-identical to Transformers' generate"
    beams: ClassVar[bool] = False

    def begin(self, prompts: Prompts) -> Search:
        return Pick(prompts)
