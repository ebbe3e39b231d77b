"""RLAIF-V: open-source AI feedback leads to super GPT-4V trustworthiness (CVPR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlm.models.base import BaseVlm
from vlm.objectives._preference import Preference, ReferenceKind


@dataclass(frozen=True)
class Rlaifv:
    """Plain DPO, on answers of the model itself that an open model has ranked, against the model as it was."""

    source: ClassVar[str] = "RLAIF-V (2405.17220), section 3.3 and official code"
    verified: ClassVar[str] = "code, second-hand"
    per: ClassVar[str] = "sample"
    pairs: ClassVar[bool] = True

    beta: float = 0.1
    reference: ReferenceKind = "start"

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        return Preference(**vars(self)).build()
