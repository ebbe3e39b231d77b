"""OPERA: Alleviating Hallucination via Over-Trust Penalty and Retrospection-Allocation (CVPR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.errors import ModelError
from vlm.models.program.overtrust import OverTrust
from vlm.models.program.program import DECODE, Control, Program
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Opera:
    """Beams that lean on one earlier token of the answer are penalised, and the search goes back to before they did.

    Beam search only (``decode: {use: beam, width: 5}`` in the paper). Every beam's likeliest tokens are tried, one pass
    each, and lose the over-trust that the last layer's attention then shows: the largest column product of the answer's
    own attention. When the same token has been leant on again and again in all beams, the search goes back to it and
    rules out what was chosen after it. The prompts of a batch are decoded one by one.

    candidates: tokens tried for each beam (the paper's fast mode: 1). scale: attention is multiplied by it before the
        product. penalty: weight of the penalty. threshold: how often a token must have been leant on (fast mode: 25);
        null never goes back. With penalty 0 and threshold null nothing changes.
    """

    source: ClassVar[str] = "OPERA (CVPR 2024), section 3 and official code"
    verified: ClassVar[str] = (
        "code by specification, numbers not reproduced; going back restores search and history, and no image is "
        "assumed 576 tokens long: ours"
    )

    candidates: int = 5
    scale: float = 50.0
    penalty: float = 1.0
    threshold: int | None = 15

    def program(self, facts: Facts) -> Program:
        if self.candidates < 1 or self.scale <= 0:
            found = f"{self.candidates} and {self.scale:g}"
            raise ModelError(f"opera: candidates and scale must be above 0; found {found}")
        if self.penalty == 0 and self.threshold is None:
            return ()
        row = Received(facts.layers - 1, "last", "each")
        settings = (row, self.candidates, self.scale, self.penalty, self.threshold)
        return ((DECODE, Control(lambda decode: OverTrust(decode, *settings), (row,))),)
