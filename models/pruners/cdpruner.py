"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning (NeurIPS 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.clip import clip_relevance
from vlm.models.program.diverse import determinant_order
from vlm.models.program.program import LLM_IN, Position, Program, Selector, Tokens, cut
from vlm.models.program.scores import language_relevance, relevance_kernel, unit_range
from vlm.models.program.segments import marks
from vlm.models.program.signals import Facts, Given


@dataclass(frozen=True)
class Cdpruner:
    """The subset of visual tokens with the largest determinant: different from each other and relevant to the question.

    Greedy choice (DPP) on the kernel of cosine similarities of projected features, weighted on both sides by the
    tokens' relevance, before the language model.

    relevance: ``clip`` is the paper's: minus the cosine of a patch with the question in CLIP's common space; ``text``
    is then the hub name or folder of the whole CLIP whose vision encoder the model has. It runs the encoder once more,
    before the pass, and reads the question from the prompt's tokens, with what the template says after the image. (The
    released code is handed the bare question.) ``language``, the mean cosine of a token with the embeddings of the
    question's words, is our reconstruction for models without such a CLIP; ``none`` is the choice by diversity alone.
    """

    source: ClassVar[str] = "CDPruner (NeurIPS 2025), section 3; official code"
    verified: ClassVar[str] = "golden choice; relevance clip: code; relevance language: reconstruction"

    keep: Budget
    relevance: Literal["language", "clip", "none"] = "language"
    position: Position = "reindex"
    text: str | None = None

    def program(self, facts: Facts) -> Program:
        if (self.relevance == "clip") != (self.text is not None):
            raise ModelError(
                "cdpruner: text: expected the name of a CLIP with relevance: clip and none without; "
                f"found {self.text!r} with relevance: {self.relevance}"
            )
        given = None if self.text is None else clip_relevance(facts, self.text, "cdpruner")

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            kernel = relevance_kernel(tokens.x, self._relevance(tokens, given))
            return marks(determinant_order(kernel, tokens.valid, int(count.max())), tokens.valid, count)

        selector = Selector(choose, () if given is None else (given,))
        return cut(facts, LLM_IN, self.keep, selector, self.position)

    def _relevance(self, tokens: Tokens, given: Given | None) -> Float[Tensor, "segments tokens"]:
        if given is not None:
            return unit_range(tokens.signal(given), tokens.valid, floor=1e-6).to(tokens.x.dtype)
        if self.relevance == "none":
            return torch.ones_like(tokens.x[..., 0])
        text = tokens.text_tokens
        asked = torch.where(text.after.any(1, keepdim=True), text.after, text.valid)
        return language_relevance(tokens.x, text.x, tokens.valid, asked)
