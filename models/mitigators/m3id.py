"""M3ID: Multi-Modal Hallucination Control by Visual Information Grounding (CVPR 2024)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.program.program import LOGITS, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class M3id:
    """Where the model is unsure, favour what the image makes likelier than the text alone does.

        s* = s + 1[max p < tau] * (1 - g) / g * (s - u),     g = exp(-decay * (t + t0))

    with s and u the log-probabilities with and without the image and t the number of generated tokens: the
    longer the answer, the stronger the correction, because the image fades from the context.

    tau: confidence above which a token is left alone. decay: lambda of the paper (0 changes nothing).
    t0: offset of t. max_weight: ceiling of (1 - g) / g, our guard against overflow; not in the paper.
    """

    source: ClassVar[str] = "M3ID (CVPR 2024), algorithm 1"
    verified: ClassVar[str] = "paper"

    decay: float = 0.02
    tau: float = 0.3
    t0: int = 0
    max_weight: float = 50.0

    def program(self, facts: Facts) -> Program:
        neutral = self.decay == 0 or self.tau == 0
        return () if neutral else ((LOGITS, Rewrite(("no_image",), self.logits)),)

    def logits(self, by_stream: Mapping[str, Float[Tensor, "batch vocab"]], step: int) -> Float[Tensor, "batch vocab"]:
        with_image = by_stream["main"].float().log_softmax(-1)
        without = by_stream["no_image"].float().log_softmax(-1)
        age = min(self.decay * (step + self.t0), math.log1p(self.max_weight))  # capped before exp can overflow
        weight = math.expm1(age)  # (1 - g) / g
        unsure = with_image.exp().amax(-1, keepdim=True) < self.tau
        return with_image + torch.where(unsure, weight, 0.0) * (with_image - without)
