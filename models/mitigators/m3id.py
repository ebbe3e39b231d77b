"""M3ID: Multi-Modal Hallucination Control by Visual Information Grounding (CVPR 2024)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.program.contexts import NoImage
from vlm.models.program.contrast import contrast, plausible, wide
from vlm.models.program.program import LOGITS, Now, Program, Rewrite
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class M3id:
    """Where the model is unsure, favour what the image makes likelier than the text alone does.

        s* = s + 1[max p < tau] * (1 - g) / g * (s - u),     g = exp(-decay * (t + t0))

    with s and u the log-probabilities with and without the image and t the number of generated tokens: the
    longer the answer, the stronger the correction, because the image fades from the context.

    tau: confidence above which a token is left alone. decay: lambda of the paper (0 changes nothing).
    t0: offset of t; ``prompt`` is the number of text tokens after the last image, as ports of the method count.
    cut: tokens less likely than this share of the likeliest are ruled out; ports do that, the paper does not.
    max_weight: ceiling of (1 - g) / g, our guard against overflow; not in the paper.
    """

    source: ClassVar[str] = "M3ID (CVPR 2024), algorithm 1"
    verified: ClassVar[str] = "paper; t0: prompt and cut: third-hand; max_weight: ours"

    decay: float = 0.02
    tau: float = 0.3
    t0: int | Literal["prompt"] = 0
    cut: float = 0.0
    max_weight: float = 50.0

    def program(self, facts: Facts) -> Program:
        neutral = self.decay == 0 or self.tau == 0
        return () if neutral else ((LOGITS, Rewrite(self.logits, (NoImage(),))),)

    def logits(self, now: Now) -> Float[Tensor, "rows vocab"]:
        with_image, without = wide(now.main).log_softmax(-1), wide(now.other(NoImage())).log_softmax(-1)
        offset: int | Tensor = now.words_after_image[:, None] if self.t0 == "prompt" else int(self.t0)
        age = torch.as_tensor(self.decay * (now.step + offset), dtype=with_image.dtype, device=with_image.device)
        weight = age.clamp(max=math.log1p(self.max_weight)).expm1()  # (1 - g) / g, capped before exp can overflow
        unsure = with_image.exp().amax(-1, keepdim=True) < self.tau
        corrected = contrast(with_image, without, torch.where(unsure, weight, 0.0))
        return corrected.masked_fill(~plausible(with_image, self.cut), -torch.inf)
