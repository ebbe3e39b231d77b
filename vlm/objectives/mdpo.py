"""mDPO: Conditional preference optimization for multimodal large language models (EMNLP 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from vlm.models.base import BaseVlm
from vlm.objectives._preference import Preference, ReferenceKind


@dataclass(frozen=True)
class Mdpo:
    """DPO that cannot leave the image out: it prefers the image to a piece of it, and keeps the chosen answer likely.

        DPO(answers) + image_weight DPO(images) + anchor_weight -log sigmoid(reward of the chosen answer - anchor)

    image_change: the worse image: at most a fifth of it blown up (``crop``), or noised (``noise``).
    """

    source: ClassVar[str] = "mDPO (EMNLP 2024), sections 3.2 and 3.3"
    verified: ClassVar[str] = "reconstructed from the equations; weights of 1 and anchor 0 as in the paper, from memory"
    per: ClassVar[str] = "sample"
    pairs: ClassVar[bool] = True

    beta: float = 0.1
    reference: ReferenceKind = "start"
    image_weight: float = 1.0
    image_change: Literal["crop", "noise"] = "crop"
    anchor_weight: float = 1.0
    anchor: float = 0.0

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        return Preference(**vars(self)).build()
