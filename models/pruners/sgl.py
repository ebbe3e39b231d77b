"""SGL: Small VLM is a Precise Guidance for Accelerating Large VLMs (A Stitch in Time Saves Nine, CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.guide import FEW, SELF, FirstAnswers, Guide, importance_signal
from vlm.models.program.program import Position, Program, cut, llm_before
from vlm.models.program.select import top_by
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Sgl:
    """The visual tokens that a guide's whole attention finds important, over all of its layers, heads and text rows.

    guide: the hub name or folder of a small model that takes the model's own batches: of the same family with equal
    tokenizer and image processor, or, beside a composed model, what ``vlm export`` wrote of one with the same
    tokenizer, views and grid. By default the model itself (``self``), whose layers behind the cut run once without it
    and once with it (all of it twice where ``generated`` asks for an answer or something acts before the cut): that
    costs more than it saves, and shows how far the ranking can carry. Seconds of a report count the guide; FLOPs, which
    leave scoring out, do not. See :class:`~vlm.models.program.guide.Guide`.

    layer: the cut is at the input of this decoder layer, by default at 0.4 of the depth. generated: so many tokens of
    the guide's answer have a say too, up to the token ``stop`` (the paper takes the whole answer; 0 the question only,
    as training must). last_visual: the last visual token's row counts as text, as in the released code.

    exit: the early exit. In generation the guide answers first, greedily, and its answer stands where the mean of its
    confidence and its consistency is above this; the model, with whatever else acts on it, runs for the others only,
    and there the guide's whole answer has a say. few: visual tokens left to the guide for the consistency. The paper
    sweeps the threshold; the released code logs the two numbers and never exits. debias: as for FastV.
    """

    source: ClassVar[str] = "SGL (CVPR 2025), sections 3.2 and 3.3; official code"
    verified: ClassVar[str] = "code; exit: paper; guide self: reconstruction"

    keep: Budget
    layer: int | None = None
    guide: Guide = SELF
    generated: int = 0
    stop: int = -1
    last_visual: bool = False
    position: Position = "keep"
    exit: float | None = None
    few: Budget = FEW
    debias: Debias | None = None

    def program(self, facts: Facts) -> Program:
        layer = max(1, int(facts.layers * 0.4)) if self.layer is None else self.layer
        guide = self.guide.of(facts, "sgl")
        if self.exit is None:
            signal = importance_signal(guide, generated=self.generated, stop=self.stop, last_visual=self.last_visual)
            return cut(facts, llm_before(layer), self.keep, top_by(signal, self.debias), self.position)
        if guide.model is None:
            raise ModelError("sgl: exit: expected a guide that answers first, a small model; found guide: self")
        first = FirstAnswers(
            guide, self.exit, self.few, last_visual=self.last_visual, generated=self.generated, stop=self.stop
        )
        return (
            *cut(facts, llm_before(layer), self.keep, top_by(first.signal, self.debias), self.position),
            *first.program,
        )
