"""VTW: Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference (AAAI 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.program import Position, Program, Select, Selector, Tokens, llm_before
from vlm.models.program.schedule import withdrawal_layer
from vlm.models.program.segments import numbers
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Vtw:
    """All visual tokens until one decoder layer, none from there on.

    layer: where they are withdrawn; without it, and without ``keep``, at 15/32 of the depth (layer 15 of LLaVA-1.5-7B,
    the authors' demo). keep: a budget instead, which says the layer, since nothing is left at the end: ``{average:
    50%}``, ``{flops: 60%}`` or ``{kv_bytes: 50%}``, met by the layer that comes nearest. The paper's search for the
    first layer that changes no answer is :func:`~vlm.models.program.calibrate.first_safe_layer`.

    A prompt that ends with its image keeps that image's last token: its row asks for the answer.
    """

    source: ClassVar[str] = "VTW (AAAI 2025), section 4; official code"
    verified: ClassVar[str] = "code"

    keep: Budget | None = None
    layer: int | None = None
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        if self.keep is not None and self.layer is not None:
            raise ModelError(f"vtw: expected a layer or a budget; found layer {self.layer} and keep {self.keep}")
        if self.keep is not None and self.keep.everything:
            return ()
        layer = self.layer if self.layer is not None else max(1, facts.layers * 15 // 32)
        if self.keep is not None:
            layer = withdrawal_layer(self.keep, facts)
        return ((llm_before(layer), Select(Budget(tokens=0), Selector(_none), self.position, exact=False)),)


def _none(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
    last = numbers(tokens.valid) == tokens.valid.sum(1, keepdim=True) - 1
    return tokens.valid & last & ~tokens.text_tokens.after.any(1, keepdim=True)
