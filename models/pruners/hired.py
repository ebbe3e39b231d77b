"""HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution VLMs (AAAI 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import VIT_OUT, Position, Program, Selector, Tokens, cut
from vlm.models.program.quota import crop_quotas, divide
from vlm.models.program.select import Ranking, top
from vlm.models.program.signals import Facts, patch_attention


@dataclass(frozen=True)
class Hired:
    """The patches that the class token looks at; of an image in tiles, more from the tiles that matter early on.

    An image that comes whole and in tiles has one budget: ``whole`` of it is for the whole picture, the rest is divided
    among the tiles by where the best-seen patches of the whole picture lie in the first block. In each view the patches
    that the class token looks at most in the block of the features stay. An image without tiles is just the latter.

    As in the code, a tile's part of the whole picture is a run of its patches in raster order, which for two tiles in a
    column is the half they show and for other arrangements is not. What rounding leaves (the code loses it) and what a
    tile is too small for goes to the whole picture, then to the tiles.

    layer: block that ranks patches, that of the features by default; early: block that divides. attention: ``received``
    takes what all tokens pay a patch, for encoders without a class token. debias: take the bias for late places and for
    padding, in each view, out of both blocks' attention (arXiv 2508.17807; as for ``fastv``).
    """

    source: ClassVar[str] = "HiRED (AAAI 2025), section 3.2; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget
    whole: float = 0.5
    layer: int | None = None
    early: int = 0
    attention: Literal["class", "received"] = "class"
    debias: Debias | None = None
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        if not 0 < self.whole < 1:
            raise ModelError(f"hired: expected whole between 0 and 1; found {self.whole}")
        signals = [patch_attention(facts, "hired", layer, self.attention) for layer in (self.early, self.layer)]
        early, late = (Ranking.of(signal, self.debias) for signal in signals)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            voting = early.score(tokens).masked_fill(~tokens.valid, -1)
            for views in _views_of(tokens):
                if len(views) > 1:
                    quota = self._quotas(voting[views[0]], int(count[views].sum()), tokens.valid[views].sum(1).tolist())
                    count = count.index_put((torch.tensor(views, device=count.device),), count.new_tensor(quota))
            return top(late.score(tokens), tokens.valid, count)

        return cut(facts, VIT_OUT, self.keep, late.over(Selector(choose, early.needs)), self.position)

    def _quotas(self, voting: Float[Tensor, " tokens"], total: int, limit: Sequence[int]) -> list[int]:
        """``total`` patches divided among the whole picture and its tiles, none above what it has."""
        crops = len(limit) - 1
        if len(voting) % crops:
            raise ModelError(f"hired: expected tiles that divide the {len(voting)} patches of a view; found {crops}")
        quota = [min(pair) for pair in zip(crop_quotas(voting, total, 1, crops, self.whole), limit, strict=True)]
        rest = total - sum(quota)
        first = min(rest, limit[0] - quota[0])
        quota[0] += first
        room = [most - part for most, part in zip(limit[1:], quota[1:], strict=True)]
        more = divide(rest - first, room, room)
        return [quota[0], *(part + extra for part, extra in zip(quota[1:], more, strict=True))]


def _views_of(tokens: Tokens) -> list[list[int]]:
    """The views of each image, the whole one first."""
    image = tokens.image[:, 0].tolist()
    return [[view for view, own in enumerate(image) if own == number] for number in sorted(set(image))]
