"""LLaVA-PruMerge+: PruMerge with patches at even distances added (arXiv 2403.15388, section 3.4)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import VIT_OUT, Position, Program, Select, Tokens, cut
from vlm.models.program.select import Ranking, added_to_neighbours, even, every_nth, outliers, top
from vlm.models.program.signals import Facts, OneHeadClassRow, PatchKeys, class_token_of, patch_attention


@dataclass(frozen=True)
class Prumergeplus:
    """PruMerge's patches and others at even distances, neighbours added to all of them, and one token for the rest.

    keep: by default each image decides: outliers of the class token's attention (1.5 quartile distances above the
    third quartile), and every n-th patch so that about three times as many are added. A given budget is met exactly,
    the rest token counted: ``outstanding`` is the share for the best patches, and the others lie at even distances
    among what is left (the paper has no such form; the share is that of its adaptive one).
    layer, neighbours, attention, debias: as for ``prumerge``; patches at even distances are then of the picture without
    its padding.
    """

    source: ClassVar[str] = "LLaVA-PruMerge (arXiv 2403.15388), section 3.4; official code"
    verified: ClassVar[str] = "golden merge; stride from code; form for a given budget ours"

    keep: Budget | None = None
    outstanding: float = 0.25
    layer: int = -1
    neighbours: int = 32
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        score = patch_attention(facts, "prumerge_plus", self.layer, self.attention)
        if self.attention == "class":
            vision = class_token_of(facts, "prumerge_plus")
            score = OneHeadClassRow(vision.block(self.layer, "prumerge_plus"))

        ranking = Ranking.of(score, self.debias)

        def adaptive(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            far = outliers(ranking.score(tokens), tokens.valid)
            step = (tokens.valid.sum(1) // far.sum(1).clamp_min(1) // 3).clamp_min(1)
            return far | every_nth(tokens.valid, step)

        def exact(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            patches = count - 1  # the rest token is the last one
            best = (patches.double() * self.outstanding).round().long()
            kept = top(ranking.score(tokens), tokens.valid, best)
            return kept | even(tokens.valid & ~kept, patches - best)

        keys = PatchKeys(score.layer)
        if self.keep is None:
            selector = added_to_neighbours(adaptive, score, keys, self.neighbours)
            selector = ranking.over(selector, adaptive=True)
            return ((VIT_OUT, Select(Budget(ratio=1.0), selector, self.position, exact=False)),)
        selector = ranking.over(added_to_neighbours(exact, score, keys, self.neighbours))
        return cut(facts, VIT_OUT, self.keep, selector, self.position)
