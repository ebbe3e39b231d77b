"""HoloV: Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention (NeurIPS 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import VIT_OUT, Position, Program, Selector, Tokens, cut
from vlm.models.program.quota import chunk_quotas, chunks_of
from vlm.models.program.scores import holistic
from vlm.models.program.select import Ranking, top_per_group
from vlm.models.program.signals import Facts, patch_attention


@dataclass(frozen=True)
class Holov:
    """The best patches of every part of the picture, each part with a quota by the score of its patches.

    Parts are runs of patches in raster order. The score adds to a patch's attention how much its likeness to the
    others of its part varies; inside a part, patches go by attention alone, as in the code. The variance is scaled to
    the part's own mean attention, so quotas follow attention whatever ``variance`` is.

    chunks: parts, fewer when an image has fewer patches. variance: weight of the variance. layer: block that gives
    attention, that of the features by default. attention: ``received`` ranks patches by what all tokens pay them, for
    encoders without a class token. A part smaller than its quota leaves the rest to others (code: zeros). debias: take
    the bias for late places and for padding out of the attention (arXiv 2508.17807; as for ``fastv``); parts are then
    of the picture without its padding.
    """

    source: ClassVar[str] = "HoloV (NeurIPS 2025), section 3; official code"
    verified: ClassVar[str] = "code"

    keep: Budget
    chunks: int = 16
    variance: float = 0.09
    layer: int | None = None
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        if self.chunks < 1:
            raise ModelError(f"holov: expected chunks of at least 1; found {self.chunks}")
        ranking = Ranking.of(patch_attention(facts, "holov", self.layer, self.attention), self.debias)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            attention, chunk = ranking.score(tokens), chunks_of(tokens.valid, self.chunks)
            score = holistic(tokens.x, attention, tokens.valid, chunk, self.variance)
            quota = chunk_quotas(score, chunk, tokens.valid, count, self.chunks)
            return top_per_group(attention, tokens.valid, chunk, quota)

        return cut(facts, VIT_OUT, self.keep, ranking.over(Selector(choose)), self.position)
