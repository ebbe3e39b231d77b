"""ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training (ICLR 2026)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import Static
from vlm.models.errors import ModelError
from vlm.models.program.artifact import Artifact, Calibration
from vlm.models.program.program import Keys, Program, Regroup, attn
from vlm.models.program.rescore import share
from vlm.models.program.signals import Facts
from vlm.models.program.sinks import first_token
from vlm.models.program.tune import Material, Tick, best_by_head

SWEEP = (0.25, 0.5, 1.5, 2.0, 3.0)  # factors that a calibration tries


@dataclass(frozen=True)
class Zerotuning:
    """The first token's attention is multiplied by gamma, and each row's weights sum to one again.

        a_0' = gamma a_0 / D,  a_j' = a_j / D,  D = 1 + (gamma - 1) a_0

    The same as adding log gamma to the scores of the first token, the one before the image. Above 1 the other tokens
    lose contrast, below 1 they gain.

    gamma: of every head; 1 changes nothing. The paper has no default: it is swept per task, from 0 to 3. calibration:
        ``auto`` or a file: a gamma for each head, from `vlm calibrate` (``objective``: what it looks for). layers:
        first and last, counted from 0; all without. rows: ``all`` as in the paper, whose models have no image.
    """

    source: ClassVar[str] = "ZeroTuning (ICLR 2026), section 3 and official code"
    verified: ClassVar[str] = "code by specification, numbers not reproduced; rows after the image only: ours"

    gamma: float = 1.5
    calibration: Calibration | None = None
    objective: Literal["accuracy", "entropy"] = "accuracy"
    layers: tuple[int, int] | None = None
    rows: Literal["after_image", "all"] = "after_image"

    def program(self, facts: Facts) -> Program:
        if not 0 <= self.gamma < torch.inf:
            raise ModelError(f"zerotuning.gamma: expected a factor of 0 or more; found {self.gamma:g}")
        layers = share(facts, "zerotuning", self.layers or (0, facts.layers - 1), 0, 0)
        return self.tuned(self.gammas(facts), layers)

    def gammas(self, facts: Facts) -> Float[Tensor, "layers heads"]:
        """The factor of each head."""
        if self.calibration is None:
            return torch.full((facts.layers, 1), self.gamma)
        like = Artifact({"gamma": torch.full((facts.layers, 1), SWEEP[-1])}, {})
        found = self.calibration.load(facts, "zerotuning", self.settings, like, "calibration")
        return found.get("gamma", (facts.layers, None), "zerotuning")

    @property
    def settings(self) -> dict[str, object]:
        """What a calibration's result depends on."""
        return {"objective": self.objective, "layers": self.layers, "rows": self.rows}

    def calibrate(self, model: Any, material: Material, tick: Tick) -> Artifact:
        """The factor of each head that serves the objective best, each head by itself."""
        layers = share(model.facts, "zerotuning", self.layers or (0, model.facts.layers - 1), 0, 0)

        def program_at(layer: int, head: int, gamma: float) -> Program:
            gammas = torch.ones(model.facts.layers, model.decoder.config.num_attention_heads)
            gammas[layer, head] = gamma
            return self.tuned(gammas, layers)

        gamma = best_by_head(model, material.asked, program_at, layers, SWEEP, 1.0, self.objective, tick)
        return Artifact({"gamma": gamma}, {})

    def tuned(self, gammas: Float[Tensor, "layers heads"], layers: range) -> Program:
        """The program for given factors; layers in which all are 1 are left alone."""
        tuned = [layer for layer in layers if bool((gammas[layer] != 1).any())]
        return tuple((attn(layer), self._regroup(gammas[layer])) for layer in tuned)

    def _regroup(self, gamma: Float[Tensor, " heads"]) -> Regroup:
        rule = Static(torch.stack([torch.ones_like(gamma), gamma], 1), renormalise=True)
        return Regroup(_groups, rule, everywhere=self.rows == "all")


def _groups(keys: Keys) -> Int[Tensor, "batch keys"]:
    return first_token(keys.layout)
