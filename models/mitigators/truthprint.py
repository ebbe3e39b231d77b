"""TruthPrInt: Mitigating LVLM Object Hallucination Via Latent Truthful-Guided Pre-Intervention (ICCV 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.models.errors import ModelError
from vlm.models.program.backtrack import Backtrack
from vlm.models.program.probe import load_probe
from vlm.models.program.program import DECODE, Control, Program
from vlm.models.program.prompts import words
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Truthprint:
    """Where a probe of the hidden states sees a made-up token coming, the sentence is taken up again before it.

    The decode goes back to the sentence's least confident token and takes another one there. For decoders of one
    hypothesis (greedy, sampled); the prompts of a batch are decoded one by one. A replication elsewhere found that
    made-up sentences have less sure tokens than true ones, against the paper's table.

    probe: a file of :func:`~vlm.models.program.probe.fit_probe`, which says the layer. threshold: probability above
        which a token counts as made up; null: the probe's own, which few true tokens exceed. retries: of one sentence
        (0 changes nothing). ends: token ids that end a sentence; by default what full stops, question and exclamation
        marks are for the tokenizer.
    """

    source: ClassVar[str] = "TruthPrInt (ICCV 2025), section 3; no released code"
    verified: ClassVar[str] = "reconstruction: probe, layer, threshold and retries are ours"

    probe: str
    threshold: float | None = None
    retries: int = 3
    ends: tuple[int, ...] = ()

    def program(self, facts: Facts) -> Program:
        if self.retries < 0:
            raise ModelError(f"truthprint.retries: expected 0 or more; found {self.retries}")
        if self.retries == 0:
            return ()
        probe = load_probe(self.probe)
        if probe.width != facts.width or not 0 <= probe.layer <= facts.layers:
            raise ModelError(
                f"truthprint.probe: expected states of width {facts.width} after at most {facts.layers} layers; "
                f"{self.probe} reads width {probe.width} after {probe.layer}"
            )
        threshold = probe.threshold if self.threshold is None else self.threshold
        marks = [mark + tail for mark in ("", "a") for tail in ".!?"]
        ends = self.ends or {words(facts, "truthprint.ends", mark)[-1] for mark in marks}

        def begin(decode: object) -> Backtrack:
            return Backtrack(decode, probe, threshold, ends, self.retries)  # type: ignore[arg-type]

        return ((DECODE, Control(begin, inner=(probe.layer,), beams=False)),)
