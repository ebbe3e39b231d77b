"""SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (ICML 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import Position, Program, Selector, Tokens, cuts, llm_before
from vlm.models.program.reduce import Reduced, add_clusters, clusters_of
from vlm.models.program.select import scored_by, top
from vlm.models.program.signals import Facts, Rated, Raters

# Tokens of 576 after each cut at the published budgets; those of the first version with its merged tokens.
_LISTS = {
    "v1.5": {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
_LAYERS = (2 / 32, 6 / 32, 15 / 32)  # whose attention rates, as shares of the published depth
_HEADS = 14  # of the second version


@dataclass(frozen=True)
class Sparsevlm:
    """Visual tokens rated by the words of the question that look at the image, cut after three layers, the rest merged.

    Raters are the words that visual tokens point to more than to the average word, judged once on the input
    embeddings. After layers 2, 6 and 15 of 32 (scaled to the depth) the tokens that they attend to most stay, and the
    best of the dropped are merged into a few cluster means (never more than a quarter of what stays, which published
    budgets respect anyway).

    version: ``v2`` (SparseVLM+) divides attention by what rotary positions alone make of it, averages the 14 heads with
    the largest mass only, and merges nothing. budget: the published list (of 192, 128, 96 or 64 tokens) whose
    proportions ``keep`` scales. layers, shares: other layers whose attention rates, and what stays after each, in
    proportion. debias: as for FastV. position: by default v1.5 counts positions anew and v2 keeps them, as in the code.

    A merged token stands at the place of its cluster's centre; the code appends it behind the kept ones. The paper's
    rule by the rank of the attention is not what its code does, and is left out.
    """

    source: ClassVar[str] = "SparseVLM (ICML 2025), sections 3.2 to 3.4; official code, v1.5 and v2"
    verified: ClassVar[str] = "golden merging; rating and cuts from code"

    keep: Budget
    version: Literal["v1.5", "v2"] = "v1.5"
    budget: Literal[192, 128, 96, 64] = 192
    layers: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    debias: Debias | None = None
    position: Position | None = None

    def program(self, facts: Facts) -> Program:
        if facts.layers < 2:
            raise ModelError(f"sparsevlm: expected a language model of two layers or more; found {facts.layers}")
        layers = self.layers or _scaled(facts.layers)
        shares = self.shares or _LISTS[self.version][self.budget][-len(layers) :]
        if len(shares) != len(layers):
            raise ModelError(f"sparsevlm: expected a share for each of the layers {layers}; found {shares}")
        position = self.position or ("reindex" if self.version == "v1.5" else "keep")
        at = [(llm_before(layer + 1), self._selector(layer)) for layer in layers]
        return cuts(facts, at, self.keep, position, shares)

    def _selector(self, layer: int) -> Selector:
        rating = Rated(layer) if self.version == "v1.5" else Rated(layer, gravity=True, heads=_HEADS)
        needs, score = scored_by(rating, self.debias)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            merged = _merged(tokens.valid.sum(1), count) if self.version == "v1.5" else torch.zeros_like(count)
            return top(score(tokens), tokens.valid, count - merged)

        def reduce(tokens: Tokens, kept: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Reduced:
            return add_clusters(tokens.x, score(tokens), tokens.valid, kept, most=count - kept.sum(1))

        return Selector(choose, (Raters(), *needs), reduce if self.version == "v1.5" else None)


def _scaled(depth: int) -> tuple[int, ...]:
    """The rating layers of a decoder of ``depth`` layers: apart from each other, and each with a layer behind it."""
    layers: list[int] = []
    for share in _LAYERS:
        layers.append(max(round(share * depth), layers[-1] + 1 if layers else 0))
    return tuple(layer for layer in layers if layer + 1 < depth)


def _merged(tokens: Int[Tensor, " segments"], count: Int[Tensor, " segments"]) -> Int[Tensor, " segments"]:
    """How many of the ``count`` tokens that remain of ``tokens`` are merged ones: as many as the dropped make clusters
    of, at most a quarter; none where nothing is dropped."""
    number = torch.arange(int(count.max()) + 1, device=count.device)
    clusters = clusters_of((tokens - count)[:, None] + number)[1]  # [S,C] if so many of the count are merged
    fits = clusters <= number
    merged = torch.where(fits.any(1), fits.int().argmax(1), count)
    return torch.where(tokens > count, merged.minimum(count // 4), 0)
