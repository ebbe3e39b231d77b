"""FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models (NeurIPS 2025)."""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.program import Position, Program, Select, Selector, Tokens, vit_after
from vlm.models.program.schedule import flow_removals
from vlm.models.program.scores import entropy_share, smoothed
from vlm.models.program.select import top
from vlm.models.program.signals import Facts, PatchAttention, PatchFlow, encoder_of


@dataclass(frozen=True)
class Flowcut:
    """Patches dropped block by block inside the vision encoder, by attention and values that flow to the class token.

    A block's score is (attention + value similarity) times the strength of the value, averaged over blocks with weight
    ``recent`` for the newest. Every second block loses more tokens the more concentrated its attention is; the last
    one before the output cuts to the budget. An encoder without a class token is scored by its mean query (the
    authors' form for Qwen2-VL).
    """

    source: ClassVar[str] = "FlowCut (NeurIPS 2025), sections 3.2 and 3.3; official code"
    verified: ClassVar[str] = "golden score and schedule; loop from code"

    keep: Budget
    recent: float = 0.5
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        vision = encoder_of(facts, "flowcut")
        if self.keep.meaning not in ("final", "after_layer"):
            raise ModelError(
                f"flowcut: it cuts before the language model; expected a share or a number, found {self.keep}"
            )
        last = vision.block(None, "flowcut")
        blocks = [block for block in range(last + 1) if (last - 1 - block) % 2 == 0 and block < last] or [last]
        keep = Budget(self.keep.ratio, self.keep.tokens)
        if keep.everything:
            return ()
        selectors = [self._selector(block, blocks[-1] - block, vision.class_token) for block in blocks]
        return tuple(
            (vit_after(block), Select(keep, selector, self.position, exact=block == blocks[-1]))
            for block, selector in zip(blocks, selectors, strict=True)
        )

    def _selector(self, block: int, left: int, class_token: bool) -> Selector:
        attention = PatchAttention(block, "class" if class_token else "mean")
        scores = tuple(PatchFlow(b, class_token) for b in range(block + 1))

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            concentration = entropy_share(tokens.signal(attention).mean(1), tokens.valid)
            n = tokens.valid.sum(1)
            rows = zip(concentration.tolist(), n.tolist(), count.tolist(), strict=True)
            remain = torch.stack([n[0].new_tensor(m - flow_removals(h, m, target, left)) for h, m, target in rows])
            values = [tokens.signal(score) for score in scores]
            *_, score = accumulate(values, lambda before, now: smoothed(before, now, self.recent))
            return top(score, tokens.valid, remain)

        return Selector(choose, (attention, *scores))
