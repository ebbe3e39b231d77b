"""ACT: Unveiling and Harnessing Hidden Attention Sinks: Enhancing LLMs without Training (ICML 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import sink_calibration
from vlm.models.errors import ModelError
from vlm.models.program.artifact import AUTO, Artifact, Calibration
from vlm.models.program.program import Keys, Program, Regroup, attn
from vlm.models.program.rescore import share
from vlm.models.program.signals import Facts, Received
from vlm.models.program.sinks import attention_sinks, chosen_heads
from vlm.models.program.tune import Material, Tick, best_by_head


@dataclass(frozen=True)
class Act:
    """Attention that sinks other than the first attract in some heads goes to all other tokens.

    A key is a sink of a head when its mean attention, over the prompt's rows that see it, is above the threshold; the
    first sink stays as it is. The others keep ``beta`` of their attention and what is freed goes to the rest in
    proportion. Sinks are those of the prompt, also for generated tokens.

    beta: share that sinks keep; 1 changes nothing. threshold: 0.1 is the code's; with ``scaled`` it is divided by the
        length of the prompt (the paper's 5 / T). calibration: which heads: those that help on calibration data, from
        `vlm calibrate` (``auto``, or a file), or null: all heads of the layers, which the paper found worse. layers:
        first and last, counted from 0; without, all but the first two and the last, as 2 to 30 of 32. rows: ``all`` as
        in the paper, whose models have no image.
    """

    source: ClassVar[str] = "ACT (ICML 2024), section 4 and official code"
    verified: ClassVar[str] = (
        "code by specification, numbers not reproduced; generated tokens, rows after the image: ours"
    )

    beta: float = 0.4
    threshold: float = 0.1
    scaled: bool = False
    calibration: Calibration | None = AUTO
    layers: tuple[int, int] | None = None
    rows: Literal["after_image", "all"] = "after_image"

    def program(self, facts: Facts) -> Program:
        if not 0 <= self.beta <= 1:
            raise ModelError(f"act.beta: expected a share from 0 to 1; found {self.beta:g}")
        layers = self.span(facts)
        return self.calibrated(self.heads(facts), layers) if self.beta < 1 else ()

    def span(self, facts: Facts) -> range:
        """The layers in which heads may be calibrated."""
        middle = (min(2, facts.layers - 1), max(facts.layers - 2, min(2, facts.layers - 1)))
        return share(facts, "act", self.layers or middle, 0, 0)

    def heads(self, facts: Facts) -> Bool[Tensor, "layers heads"]:
        """Which heads are calibrated."""
        if self.calibration is None:
            return torch.ones(facts.layers, 1, dtype=torch.bool)
        like = Artifact({"heads": torch.ones(facts.layers, 1)}, {})
        found = self.calibration.load(facts, "act", self.settings, like, "calibration")
        return found.get("heads", (facts.layers, None), "act") > 0

    @property
    def settings(self) -> dict[str, object]:
        """What a calibration's result depends on."""
        return {name: value for name, value in vars(self).items() if name != "calibration"}

    def calibrate(self, model: Any, material: Material, tick: Tick) -> Artifact:
        """The heads that raise accuracy when they alone are calibrated."""
        layers = self.span(model.facts)

        def program_at(layer: int, head: int, on: float) -> Program:
            heads = torch.zeros(model.facts.layers, model.decoder.config.num_attention_heads, dtype=torch.bool)
            heads[layer, head] = bool(on)
            return self.calibrated(heads, layers)

        found = best_by_head(model, material.asked, program_at, layers, (1.0,), 0.0, "accuracy", tick)
        return Artifact({"heads": found}, {})

    def calibrated(self, heads: Bool[Tensor, "layers heads"], layers: range) -> Program:
        """The program for given heads; layers without any are left alone."""
        chosen = [layer for layer in layers if bool(heads[layer].any())]
        return tuple((attn(layer), self._regroup(layer, heads[layer])) for layer in chosen)

    def _regroup(self, layer: int, heads: Bool[Tensor, " heads"]) -> Regroup:
        paid = Received(layer, "all", "each")

        def groups(keys: Keys) -> Int[Tensor, "batch heads keys"]:
            return chosen_heads(attention_sinks(keys.signal(paid), keys.layout, self.threshold, self.scaled), heads)

        return Regroup(groups, sink_calibration(self.beta), (paid,), everywhere=self.rows == "all")
