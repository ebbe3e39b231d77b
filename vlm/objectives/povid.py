"""POVID: Aligning modalities in vision large language models via preference fine-tuning (2024)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlm.models.base import BaseVlm
from vlm.objectives._preference import Preference, ReferenceKind


@dataclass(frozen=True)
class Povid:
    """DPO whose second rejected answer is what the model itself would say if it saw a noised image (stage 2).

        (1 - own_weight) DPO(chosen, rejected) + own_weight DPO(chosen, own)

    own: token by token after the chosen answer so far, the likeliest token under the noised image; its log p is under
    the clean image. With own_weight 0 it is the paper's stage 1.

    own_step: of 1000 of the diffusion, as in VCD. reference: ``adapter`` or ``none``; own answers change with the
    model, so they cannot be measured beforehand.
    """

    source: ClassVar[str] = "POVID (2402.11411), section 3 and official code"
    verified: ClassVar[str] = "code, second-hand; noise on normalised pixels as in VCD, not on raw ones: ours"
    per: ClassVar[str] = "sample"
    pairs: ClassVar[bool] = True

    beta: float = 0.1
    reference: ReferenceKind = "adapter"
    own_weight: float = 0.5
    own_step: int = 500

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        return Preference(**vars(self)).build()
