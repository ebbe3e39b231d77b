"""VAR: See What You Are Told: Visual Attention Sink in Large Multimodal Models (ICLR 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import TEXT, TEXT_SINK, VISUAL, VISUAL_SINK, Redistribution, visual_redistribution
from vlm.models.errors import ModelError
from vlm.models.program.program import Keys, Program, Regroup, attn
from vlm.models.program.signals import Facts, Peak


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
    skip_last: leave the last layer alone (the paper does; the released code does not).
    """

    source: ClassVar[str] = "VAR (ICLR 2025), section 5 and appendix A.1"
    verified: ClassVar[str] = "code; without dims: reconstruction"

    taken: float = 0.6
    rho: float = 0.5
    tau: float = 20.0
    image_min: float = 0.2
    dims: tuple[int, ...] = ()
    semantics: Literal["paper", "code"] = "paper"
    skip_last: bool = True

    def program(self, facts: Facts) -> Program:
        if foreign := [d for d in self.dims if not 0 <= d < facts.width]:
            raise ModelError(f"var.dims: the language model has dimensions 0..{facts.width - 1}; found {foreign[0]}")
        moved = self.taken if self.semantics == "paper" else 1 - self.taken
        rule = visual_redistribution(moved, self.rho, self.image_min)
        layers = range(2, facts.layers - self.skip_last)
        return tuple((attn(layer), self._regroup(Peak(layer, self.dims), rule)) for layer in layers if moved > 0)

    def _regroup(self, peak: Peak, rule: Redistribution) -> Regroup:
        def groups(keys: Keys) -> Int[Tensor, "batch keys"]:
            sink, visual = keys.signal(peak) > self.tau, keys.layout.visual
            plain = torch.where(visual, VISUAL, TEXT)
            return torch.where(sink, torch.where(visual, VISUAL_SINK, TEXT_SINK), plain)

        return Regroup(groups, rule, (peak,))
