"""HA-DPO: Beyond Hallucinations, hallucination-aware direct preference optimisation (2023)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlm.models.base import BaseVlm
from vlm.objectives._preference import Preference, ReferenceKind


@dataclass(frozen=True)
class Hadpo:
    """DPO on pairs whose two answers are in one style, with a language model loss beside it where that is wanted.

    lm_weight: the paper's code has one for MiniGPT-4 alone (0.5 in its README) and 0 for LLaVA; there it is of
    instruction data, here of the chosen answer.
    """

    source: ClassVar[str] = "HA-DPO (2311.16839), section 3.3 and official code"
    verified: ClassVar[str] = "code, second-hand; lm_weight on the chosen answer: ours"
    per: ClassVar[str] = "sample"
    pairs: ClassVar[bool] = True

    beta: float = 0.1
    reference: ReferenceKind = "start"
    lm_weight: float = 0.0

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        return Preference(**vars(self)).build()
