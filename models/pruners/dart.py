"""DART: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (EMNLP 2025)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.diverse import unlike_pivots
from vlm.models.program.program import Position, Program, Selector, Tokens, cut, llm_before
from vlm.models.program.scores import key_strength
from vlm.models.program.segments import places, rows_at
from vlm.models.program.select import top
from vlm.models.program.signals import Facts, Hidden, KeyStates


@dataclass(frozen=True)
class Dart:
    """A few pivot tokens of strong keys, and for each of them the visual tokens least alike to it.

    Pivots are the visual tokens and the words of the question with the largest L1 norm of their keys in layer
    ``layer - 1``; where the text after the image is too short, earlier text fills up. Likeness is the cosine of the
    states that enter ``layer``, after the decoder's final norm. Needs no attention.

    layer: the cut is at the input of this decoder layer (2 in the paper; LightCompress uses 5). pivots, text_pivots:
    how many of each. count: ``exact`` keeps what the budget says; ``code`` keeps the visual pivots and for each pivot
    ``budget // pivots`` more, as the code does: with 4 and 4, up to 4 tokens more than the budget.
    """

    source: ClassVar[str] = "DART (EMNLP 2025), algorithm 1; LightCompress's port"
    verified: ClassVar[str] = "golden choice; pivots from code"

    keep: Budget
    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4
    count: Literal["exact", "code"] = "exact"
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        keys, state = KeyStates(self.layer - 1), Hidden(self.layer, normed=True)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            if self.count == "code":
                each = count // (self.pivots + self.text_pivots)
                count = self.pivots + each * (self.pivots + self.text_pivots)
            text = tokens.text_tokens
            strength = key_strength(text.signal(keys))
            wanted = torch.full_like(count, self.text_pivots)
            words = top(strength, text.after, wanted)
            words = words | top(strength, text.valid & ~text.after, wanted - words.sum(1))
            place, there = places(words)
            own = top(key_strength(tokens.signal(keys)), tokens.valid, torch.full_like(count, self.pivots))
            others = rows_at(text.signal(state), place)
            return unlike_pivots(tokens.signal(state), tokens.valid, own, others, there, count)

        program = cut(facts, llm_before(self.layer), self.keep, Selector(choose, (keys, state)), self.position)
        return tuple((site, replace(op, exact=self.count == "exact")) for site, op in program)  # type: ignore[arg-type]
