"""VAR: See What You Are Told: Visual Attention Sink in Large Multimodal Models (ICLR 2025)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import TEXT, TEXT_SINK, VISUAL, VISUAL_SINK, Redistribution, visual_redistribution
from vlm.models.errors import ModelError
from vlm.models.program.artifact import Artifact, Calibration
from vlm.models.program.program import Keys, Program, Regroup, attn
from vlm.models.program.signals import Facts, Peak
from vlm.models.program.sinks import SHARE, first_states, sink_dimensions
from vlm.models.program.tune import Material, Tick


@dataclass(frozen=True)
class Var:
    """Attention that sink tokens attract goes to the other visual tokens, in heads that look at the image.

    A token is a sink in a layer when the state that enters it has, after RMS normalisation, an entry above
    ``tau`` in one of the sink dimensions. Layers 0 and 1 have no sinks. Rows after the image are changed.

    taken: share p of the sinks' attention that moves (0 changes nothing). The paper says 0.6 moves; its code
        keeps 0.6 and moves 0.4: ``semantics: code`` reads the number as the share kept.
    rho: least share of the image's attention that non-sink visual tokens must have for a head to be changed.
    tau: 20 belongs to width 4096; the largest possible entry is sqrt(width), so a narrow model needs less.
    dims: sink dimensions of the language model (LLaMA-2-7B: 1415, 2533; LLaMA-2-13B: 2100, 4743; Qwen2-VL-7B:
        458, 2570). Without any, all dimensions count: our reading, not the paper's.
    calibration: ``auto`` or a file: the dimensions are found on prompts. They are those (two at most) in which the
        first token's state, after half of the layers, is above ``tau`` in nearly all of them: our rule, for models of
        which the paper names none.
    skip_last: leave the last layer alone (the paper does; the released code does not).
    """

    source: ClassVar[str] = "VAR (ICLR 2025), section 5 and appendix A.1"
    verified: ClassVar[str] = "code; without dims, and how a calibration finds them: reconstruction"

    taken: float = 0.6
    rho: float = 0.5
    tau: float = 20.0
    image_min: float = 0.2
    dims: tuple[int, ...] = ()
    semantics: Literal["paper", "code"] = "paper"
    skip_last: bool = True
    calibration: Calibration | None = None

    def program(self, facts: Facts) -> Program:
        if foreign := [d for d in self.dims if not 0 <= d < facts.width]:
            raise ModelError(f"var.dims: the language model has dimensions 0..{facts.width - 1}; found {foreign[0]}")
        dims = self.dims if self.calibration is None else self._found(facts)
        moved = self.taken if self.semantics == "paper" else 1 - self.taken
        rule = visual_redistribution(moved, self.rho, self.image_min)
        layers = range(2, facts.layers - self.skip_last)
        return tuple((attn(layer), self._regroup(Peak(layer, dims), rule)) for layer in layers if moved > 0)

    def _found(self, facts: Facts) -> tuple[int, ...]:
        """The dimensions that a calibration found."""
        if self.dims:
            raise ModelError("var.calibration: finds the sink dimensions, and dims gives them; use one of the two")
        assert self.calibration is not None
        like = Artifact({"dims": torch.zeros(1, dtype=torch.long)}, {})
        found = self.calibration.load(facts, "var", self.settings, like, "calibration").get("dims", (None,), "var")
        return tuple(int(dim) for dim in found)

    @property
    def settings(self) -> dict[str, object]:
        """What a calibration's result depends on."""
        return {"tau": self.tau}

    def calibrate(self, model: Any, material: Material, tick: Tick) -> Artifact:
        """The sink dimensions."""
        states = []
        for number, (inputs, _) in enumerate(material.asked):
            states.append(first_states(model, inputs, model.facts.layers // 2))
            tick(number + 1, len(material.asked))
        dims, likely = sink_dimensions(torch.cat(states), self.tau)
        if not dims:
            raise ModelError(
                f"var.tau: no dimension of the first token's state is above {self.tau:g} in {SHARE:.0%} of prompts; "
                f"the largest that is has {likely:.1f}; set tau lower, or calibration: null for all dimensions"
            )
        return Artifact({"dims": torch.tensor(dims)}, {"dims": str(dims)})

    def _regroup(self, peak: Peak, rule: Redistribution) -> Regroup:
        def groups(keys: Keys) -> Int[Tensor, "batch keys"]:
            sink, visual = keys.signal(peak) > self.tau, keys.layout.visual
            plain = torch.where(visual, VISUAL, TEXT)
            return torch.where(sink, torch.where(visual, VISUAL_SINK, TEXT_SINK), plain)

        return Regroup(groups, rule, (peak,))
