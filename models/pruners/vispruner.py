"""VisPruner: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (ICCV 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.diverse import important_and_different
from vlm.models.program.program import VIT_OUT, Position, Program, Selector, Tokens, cut
from vlm.models.program.select import Ranking
from vlm.models.program.signals import Facts, patch_attention


@dataclass(frozen=True)
class Vispruner:
    """The patches that the class token looks at, and of the others those that have no twin.

    ratio: share of the budget for the class token's choice; 1 is FasterVLM. step: twins struck out at once. layer:
    block that gives attention, that of the features by default. attention: ``received`` ranks patches by what all
    tokens pay them, for encoders without a class token (the authors' form for Qwen2.5-VL). debias: take the bias for
    late places and for padding out of the attention (arXiv 2508.17807; as for ``fastv``).
    """

    source: ClassVar[str] = "VisPruner (ICCV 2025), section 3; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget
    ratio: float = 0.5
    step: int = 8
    layer: int | None = None
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        if not 0 <= self.ratio <= 1 or self.step < 1:
            raise ModelError(
                f"vispruner: expected ratio in 0..1 and step of at least 1; found {self.ratio}, {self.step}"
            )
        ranking = Ranking.of(patch_attention(facts, "vispruner", self.layer, self.attention), self.debias)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            score = ranking.score(tokens)
            return important_and_different(tokens.x, score, tokens.valid, count, self.ratio, self.step)

        return cut(facts, VIT_OUT, self.keep, ranking.over(Selector(choose)), self.position)
