"""SGL: Small VLM is a Precise Guidance for Accelerating Large VLMs (A Stitch in Time Saves Nine, CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.program.budget import Budget
from vlm.models.program.guide import SELF, Guide, importance_signal
from vlm.models.program.program import Position, Program, cut, llm_before
from vlm.models.program.select import top_by
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Sgl:
    """The visual tokens that a guide's whole attention finds important, over all of its layers, heads and text rows.

    The guide is a small model of the same family in the paper, given in Python; in a recipe it is the model itself
    (``guide: self``), in a first pass without the cut: it then costs more than it saves, and shows how far the ranking
    can carry. Seconds of a report count that pass; FLOPs, which leave scoring out, do not. See
    :class:`~vlm.models.program.guide.Guide`.

    layer: the cut is at the input of this decoder layer, by default at 0.4 of the depth. generated: so many tokens of
    the guide's answer have a say too, up to the token ``stop`` (the paper takes the whole answer; 0 the question only,
    as training must). last_visual: the last visual token's row counts as text, as in the released code.

    The paper's early exit, where the guide's answer does, is :func:`~vlm.models.program.guide.draft`, in Python.
    """

    source: ClassVar[str] = "SGL (CVPR 2025), section 3.2; official code"
    verified: ClassVar[str] = "code; guide self: reconstruction"

    keep: Budget
    layer: int | None = None
    guide: Guide = SELF
    generated: int = 0
    stop: int = -1
    last_visual: bool = False
    position: Position = "keep"

    def program(self, facts: Facts) -> Program:
        layer = max(1, int(facts.layers * 0.4)) if self.layer is None else self.layer
        signal = importance_signal(self.guide, generated=self.generated, stop=self.stop, last_visual=self.last_visual)
        return cut(facts, llm_before(layer), self.keep, top_by(signal), self.position)
