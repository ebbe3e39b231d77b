"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning (NeurIPS 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.diverse import determinant_order
from vlm.models.program.program import LLM_IN, Position, Program, Selector, Tokens, cut
from vlm.models.program.scores import language_relevance, relevance_kernel
from vlm.models.program.segments import marks
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Cdpruner:
    """The subset of visual tokens with the largest determinant: different from each other and relevant to the question.

    Greedy choice (DPP) on the kernel of cosine similarities of projected features, weighted on both sides by the
    tokens' relevance, before the language model.

    relevance: ``language``, the mean cosine of a token with the embeddings of the question's words, is our
    reconstruction; ``none`` is the choice by diversity alone. The paper's relevance is CLIP's: minus the cosine of a
    patch with the text embedding of the question. It needs CLIP's text tower and the question as text beside the model,
    which a batch does not carry; its formula is :func:`~vlm.models.program.scores.text_relevance`.
    """

    source: ClassVar[str] = "CDPruner (NeurIPS 2025), section 3; official code"
    verified: ClassVar[str] = "golden choice; relevance: reconstruction (CLIP's text tower is not there)"

    keep: Budget
    relevance: Literal["language", "none"] = "language"
    position: Position = "reindex"

    def program(self, facts: Facts) -> Program:
        return cut(facts, LLM_IN, self.keep, Selector(self._choose), self.position)

    def _choose(self, tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
        kernel = relevance_kernel(tokens.x, self._relevance(tokens))
        return marks(determinant_order(kernel, tokens.valid, int(count.max())), tokens.valid, count)

    def _relevance(self, tokens: Tokens) -> Float[Tensor, "segments tokens"]:
        if self.relevance == "none":
            return torch.ones_like(tokens.x[..., 0])
        text = tokens.text_tokens
        asked = torch.where(text.after.any(1, keepdim=True), text.after, text.valid)
        return language_relevance(tokens.x, text.x, tokens.valid, asked)
