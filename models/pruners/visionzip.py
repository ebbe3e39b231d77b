"""VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import VIT_OUT, Position, Program, Selector, Tokens, cut
from vlm.models.program.reduce import Reduced, add_contextual
from vlm.models.program.select import Ranking, top
from vlm.models.program.signals import Facts, PatchKeys, encoder_of, patch_attention


@dataclass(frozen=True)
class Visionzip:
    """The patches that the class token looks at, and contextual tokens that the others are gathered in.

    contextual: share of the budget for contextual tokens (10 of 64 in the paper). layer: block that gives attention
    and keys, that of the features by default. attention: ``received`` ranks patches by what all tokens pay them, for
    encoders without a class token (the authors' form for Qwen). The class token itself, which the code hands over too,
    is not kept. debias: take the bias for late places and for padding out of the attention (arXiv 2508.17807; as for
    ``fastv``); contextual tokens are then of the picture without its padding.
    """

    source: ClassVar[str] = "VisionZip (CVPR 2025), section 3.2; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget
    contextual: float = 10 / 64
    layer: int | None = None
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        ranking = Ranking.of(patch_attention(facts, "visionzip", self.layer, self.attention), self.debias)
        keys = PatchKeys(encoder_of(facts, "visionzip").block(self.layer, "visionzip"))

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            return top(ranking.score(tokens), tokens.valid, count - self._contextual(count))

        def reduce(tokens: Tokens, kept: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Reduced:
            return add_contextual(tokens.x, tokens.signal(keys).mean(1), tokens.valid, kept, self._contextual(count))

        return cut(facts, VIT_OUT, self.keep, ranking.over(Selector(choose, (keys,), reduce)), self.position)

    def _contextual(self, count: Int[Tensor, " segments"]) -> Int[Tensor, " segments"]:
        return (count.double() * self.contextual).round().long()
