"""TruthPrInt: Mitigating LVLM Object Hallucination Via Latent Truthful-Guided Pre-Intervention (ICCV 2025)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm.models.errors import ModelError
from vlm.models.program.artifact import AUTO, Artifact, Calibration
from vlm.models.program.backtrack import Backtrack
from vlm.models.program.probe import WHO, Probe, Space, answer_states, fit_probe, probe_of
from vlm.models.program.program import DECODE, Control, Program
from vlm.models.program.prompts import words
from vlm.models.program.signals import Facts
from vlm.models.program.tune import Material, Tick


@dataclass(frozen=True)
class Truthprint:
    """Where a probe of the hidden states sees a made-up token coming, the sentence is taken up again before it.

    The decode goes back to the sentence's least confident token and takes another one there. For decoders of one
    hypothesis (greedy, sampled); the prompts of a batch are decoded one by one. A replication elsewhere found that
    made-up sentences have less sure tokens than true ones, against the paper's table.

    probe: ``auto``: it learns from what the model itself says of the pictures of the recipe's training data, whose tags
        say what is there; held-out mentions set its threshold. Or a file of a
        :class:`~vlm.models.program.probe.Probe`. threshold: probability above which a token counts as made up; null:
        the probe's own, which few true tokens exceed. retries: of one sentence (0 changes nothing). ends: token ids
        that end a sentence; by default what full stops, question and exclamation marks are for the tokenizer. layer:
        decoder layers before the states that ``auto`` learns from; 60 % of them by default.
    """

    source: ClassVar[str] = "TruthPrInt (ICCV 2025), section 3; no released code"
    verified: ClassVar[str] = "reconstruction: probe, layer, threshold and retries are ours"

    probe: Calibration = AUTO
    threshold: float | None = None
    retries: int = 3
    ends: tuple[int, ...] = ()
    layer: int | None = None

    def program(self, facts: Facts) -> Program:
        if self.retries < 0:
            raise ModelError(f"truthprint.retries: expected 0 or more; found {self.retries}")
        if self.retries == 0:
            return ()
        like = Probe(0, 0.5, Space(torch.zeros(facts.width)), torch.zeros(1, facts.width + 1), torch.zeros(1, 2))
        probe = probe_of(self.probe.load(facts, WHO, self.settings, like.artifact, "probe"))
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

    @property
    def settings(self) -> dict[str, object]:
        """What a calibration's result depends on."""
        return {"layer": self.layer}

    def calibrate(self, model: Any, material: Material, tick: Tick) -> Artifact:
        """The probe of one layer. Raises ModelError where the model's answers have no made-up, or no true, mentions."""
        layer = round(0.6 * model.facts.layers) if self.layer is None else self.layer
        if not 0 <= layer <= model.facts.layers:
            raise ModelError(f"truthprint.layer: expected 0 to {model.facts.layers}; found {layer}")
        states, made_up = [], []
        for number, (inputs, answers, mentions) in enumerate(material.judged):
            by_row = answer_states(model, inputs, answers, layer)
            chosen = [(row, token, wrong) for row, named in enumerate(mentions) for token, wrong in named]
            states += [by_row[row][token].float().cpu() for row, token, _ in chosen]
            made_up += [wrong for *_, wrong in chosen]
            tick(number + 1, len(material.judged))
        if not states:
            raise ModelError("truthprint.probe: expected answers that name objects to learn from; found none")
        found = fit_probe(torch.stack(states), torch.tensor(made_up), layer).artifact
        counts = {"mentions": str(len(made_up)), "made_up": str(sum(made_up))}
        return Artifact(found.tensors, {**found.about, **counts})
