"""AgilePruner: attention and diversity for adaptive visual token pruning in large VLMs (ICLR 2026)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.diverse import walk
from vlm.models.program.program import VIT_OUT, Position, Program, Selector, Tokens, cut
from vlm.models.program.scores import effective_rank
from vlm.models.program.select import Ranking
from vlm.models.program.signals import Facts, patch_attention


@dataclass(frozen=True)
class Agilepruner:
    """Patches by class-token attention, each striking out those near to it, the farther the richer the image.

    The i-th patch strikes out those at a cosine distance below ``i * slope * erank / mean_rank``, where erank is the
    effective rank of the image's features: simple images go by attention, complex ones by diversity.

    mean_rank: effective rank that is usual in the data; calibrate it (the page's examples are 78 for OCR data and 106
    for POPE, the default lies between). slope: distance for each rank. largest: the distance never exceeds it. step:
    ``rank`` counts i over all patches, ``picked`` over those taken. centre: subtract the mean patch for the rank.
    layer: block that gives attention, that of the features by default. attention: ``received`` ranks patches by what
    all tokens pay them, for encoders without a class token. debias: take the bias for late places and for padding out
    of the attention (arXiv 2508.17807; as for ``fastv``).

    Reconstructed from the project page: no code is published, ``largest``, the default of ``mean_rank`` and what
    happens when too few patches remain (the best ones return) are ours.
    """

    source: ClassVar[str] = "AgilePruner (ICLR 2026), project page"
    verified: ClassVar[str] = "reconstruction"

    keep: Budget
    mean_rank: float = 92.0
    slope: float = 0.01
    largest: float = 0.9
    step: Literal["rank", "picked"] = "rank"
    centre: bool = False
    layer: int | None = None
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        if self.mean_rank <= 0 or self.slope < 0:
            found = f"{self.mean_rank}, {self.slope}"
            raise ModelError(f"agilepruner: expected mean_rank above 0 and slope of at least 0; found {found}")
        ranking = Ranking.of(patch_attention(facts, "agilepruner", self.layer, self.attention), self.debias)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            slope = self.slope * effective_rank(tokens.x, tokens.valid, centre=self.centre) / self.mean_rank
            return walk(tokens.x, ranking.score(tokens), tokens.valid, count, slope, self.largest, self.step)

        return cut(facts, VIT_OUT, self.keep, ranking.over(Selector(choose)), self.position)
