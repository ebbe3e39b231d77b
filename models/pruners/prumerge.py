"""LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (arXiv 2403.15388)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import VIT_OUT, Position, Program, Select, Tokens, cut
from vlm.models.program.select import Ranking, added_to_neighbours, outliers, top
from vlm.models.program.signals import Facts, OneHeadClassRow, PatchKeys, class_token_of, patch_attention


@dataclass(frozen=True)
class Prumerge:
    """The patches of outstanding class-token attention, their neighbours added to them, and one token for the rest.

    keep: by default each image decides: patches above the third quartile by 1.5 quartile distances, and the rest
    token. A given budget is met exactly by the best patches, the rest token counted. layer: block that gives attention
    and keys, the encoder's last whatever block gives the features; all its heads are taken as one. neighbours: patches
    of most alike keys that are added, weighted by their attention. attention: ``received`` takes what all tokens pay
    a patch (mean over heads), for encoders without a class token; that form is ours. debias: take the bias for late
    places and for padding out of the ranking (arXiv 2508.17807; as for ``fastv``); what is merged is weighted by the
    attention itself, and padding is not merged. Tokens stay in the image's order (the code sorts them by attention).
    """

    source: ClassVar[str] = "LLaVA-PruMerge (arXiv 2403.15388), sections 3.2 and 3.3; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget | None = None
    layer: int = -1
    neighbours: int = 32
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        score = patch_attention(facts, "prumerge", self.layer, self.attention)
        if self.attention == "class":
            vision = class_token_of(facts, "prumerge")
            score = OneHeadClassRow(vision.block(self.layer, "prumerge"))

        ranking = Ranking.of(score, self.debias)

        def adaptive(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            return outliers(ranking.score(tokens), tokens.valid)

        def exact(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            return top(ranking.score(tokens), tokens.valid, count - 1)  # the rest token is the last one

        keys = PatchKeys(score.layer)
        if self.keep is None:
            selector = added_to_neighbours(adaptive, score, keys, self.neighbours)
            selector = ranking.over(selector, adaptive=True)
            return ((VIT_OUT, Select(Budget(ratio=1.0), selector, self.position, exact=False)),)
        selector = ranking.over(added_to_neighbours(exact, score, keys, self.neighbours))
        return cut(facts, VIT_OUT, self.keep, selector, self.position)
