"""ToMe: Token Merging: Your ViT But Faster (ICLR 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.merge import counts_to, merge_away, merging_away
from vlm.models.program.program import Position, Program, Select, Selector, Tokens, vit_mid
from vlm.models.program.reduce import Reduced
from vlm.models.program.schedule import budgets
from vlm.models.program.signals import Facts, PatchKeys, encoder_of


@dataclass(frozen=True)
class Tome:
    """Patches merged pair by pair inside the vision encoder, in every block between attention and MLP.

    Patches are alike by the cosine of their keys (mean over heads); a merged patch is the mean of its parts and counts
    as many in the attention of later blocks. The class token and registers never merge. Blocks up to that of the
    features merge equally many, so that exactly the budget is left at the end.

    inflection: -1 merges more in early blocks (none in the last), 1 more in late ones. proportional: later blocks weigh
    a merged patch by its size. Patches stay in the image's order; a merged one stands where the later of a pair stood
    (the code sorts them into two halves, which attention does not notice).
    """

    source: ClassVar[str] = "ToMe (ICLR 2023), section 3; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget
    inflection: float = 0.0
    proportional: bool = True
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        vision = encoder_of(facts, "tome")
        if not -1 <= self.inflection <= 1:
            raise ModelError(f"tome: expected inflection in -1..1; found {self.inflection}")
        last = vision.block(None, "tome")
        [keep] = budgets(self.keep, facts, [0])
        if keep.everything:
            return ()
        if facts.visual is not None:
            counts_to(keep.of(facts.visual), facts.visual, last + 1, self.inflection)  # refuses what cannot be reached
        selectors = [self._selector(block, last + 1, vision.class_token) for block in range(last + 1)]
        return tuple(
            (vit_mid(block), Select(keep, selector, self.position, exact=block == last, weigh=self.proportional))
            for block, selector in enumerate(selectors)
        )

    def _selector(self, block: int, blocks: int, class_token: bool) -> Selector:
        keys = PatchKeys(block)

        def merges(tokens: Tokens, count: Int[Tensor, " segments"]) -> Int[Tensor, " segments"]:
            pairs = zip(count.tolist(), tokens.total.tolist(), strict=True)
            left = [counts_to(*pair, blocks, self.inflection)[block] for pair in pairs]
            return tokens.valid.sum(1) - count.new_tensor(left)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            metric = tokens.signal(keys).mean(1)
            gone = merging_away(metric, tokens.valid, merges(tokens, count), before=int(class_token))
            return tokens.valid & ~gone

        def reduce(tokens: Tokens, kept: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Reduced:
            size = tokens.size if tokens.size is not None else torch.ones_like(tokens.valid, dtype=torch.float32)
            gone, metric = tokens.valid & ~kept, tokens.signal(keys).mean(1)
            return merge_away(tokens.x, metric, size, tokens.valid, gone, int(class_token))

        return Selector(choose, (keys,), reduce)
