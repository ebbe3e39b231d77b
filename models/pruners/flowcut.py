"""FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models (NeurIPS 2025)."""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.program import Position, Program, Select, Selector, Site, Tokens, llm_before, vit_after
from vlm.models.program.schedule import budgets, flow_removals, staged
from vlm.models.program.scores import entropy_share, smoothed
from vlm.models.program.select import top, top_by
from vlm.models.program.signals import Facts, PatchAttention, PatchFlow, VisualFlow, encoder_of

SECOND = 2  # decoder layer at whose input the second cut is: after two layers
FORMS = {"llava": 1.0, "next": 2.5, "qwen": 2.0}  # how many times the budget the encoder hands over


@dataclass(frozen=True)
class Flowcut:
    """Patches dropped block by block inside the vision encoder, by attention and values that flow to the class token.

    A block's score is (attention + value similarity) times the strength of the value, averaged over blocks with weight
    ``recent`` for the newest. Every second block loses more tokens the more concentrated its attention is; the last
    one before the output cuts to the budget. An encoder without a class token is scored by its mean query times the
    strength of the value (the authors' score for Qwen2-VL).

    form: ``llava`` cuts in the encoder alone. ``next`` (LLaVA-NeXT) and ``qwen`` (Qwen2-VL) hand over 2.5 times and
    twice the budget, and cut to it after the second layer of the language model, by the flow from the rows that ask;
    2.5 is half of the budget in each of five views. ``qwen`` makes its last cut in the encoder after the last block,
    the others before it. similarity: of values, ``softmax`` of their products as in the code or ``cosine`` as in the
    paper. position: the code for Qwen keeps positions, the others count anew.
    Numbers of removed patches are each image's own (the code takes the largest of the batch). There is no ``debias``:
    the score is a product of attention, likeness and norm of values, averaged over blocks, and no attention to correct.

    In Qwen's own encoder the 2x2 patches of a visual token go together, by the mean of their scores, and keep their
    places. The code drops single patches, merges four that are left whether neighbours or not, and gives them the
    positions of the image's first tokens. The mean query asks the whole image in every block, also where the block
    itself attends inside windows (Qwen2.5-VL), as the code does.
    """

    source: ClassVar[str] = "FlowCut (NeurIPS 2025), sections 3.2 and 3.3; official code"
    verified: ClassVar[str] = "golden score and schedule; loop from code"

    keep: Budget
    recent: float = 0.5
    form: Literal["llava", "next", "qwen"] = "llava"
    similarity: Literal["softmax", "cosine"] = "softmax"
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        vision = encoder_of(facts, "flowcut")
        inside: tuple[tuple[Site, Select], ...] = ()
        if self.keep.everything:
            return ()
        if self.form == "llava":
            [keep] = budgets(self.keep, facts, [0])
        else:
            keep, left = staged(self.keep, facts, SECOND, FORMS[self.form])
            inside = ((llm_before(SECOND), Select(left, top_by(VisualFlow(SECOND - 1)), self.position)),)
        last = vision.block(None, "flowcut")
        end = last if self.form == "qwen" else max(last - 1, 0)  # the block after which the last cut is
        blocks = list(range(end % 2, end + 1, 2))
        selectors = [self._selector(block, blocks[-1] - block, vision.class_token) for block in blocks]
        cuts = [Select(keep, selector, self.position, exact=False) for selector in selectors]
        cuts[-1] = replace(cuts[-1], exact=True)
        return (*zip(map(vit_after, blocks), cuts, strict=True), *inside)

    def _selector(self, block: int, left: int, class_token: bool) -> Selector:
        attention = PatchAttention(block, "class" if class_token else "mean")
        scores = tuple(PatchFlow(b, class_token, self.similarity) for b in range(block + 1))

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            concentration = entropy_share(tokens.signal(attention).mean(1), tokens.valid)
            n = tokens.valid.sum(1)
            rows = zip(concentration.tolist(), n.tolist(), count.tolist(), strict=True)
            remain = torch.stack([n[0].new_tensor(m - flow_removals(h, m, target, left)) for h, m, target in rows])
            values = [tokens.signal(score) for score in scores]
            *_, score = accumulate(values, lambda before, now: smoothed(before, now, self.recent))
            return top(score, tokens.valid, remain)

        return Selector(choose, (attention, *scores))
