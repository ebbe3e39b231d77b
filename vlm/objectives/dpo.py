"""Direct preference optimisation: ``objective: dpo``, on samples with a rejected answer."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from vlm.models.base import BaseVlm
from vlm.objectives._preference import Preference, ReferenceKind


@dataclass(frozen=True)
class Dpo:
    """The chosen answer becomes likelier than the rejected one, against a reference.

        -log sigmoid(beta [(log p(chosen) - ref) - (log p(rejected) - ref)]),  log p: sum over the answer's tokens

    beta: how far the model may go from the reference.
    reference: ``start``, the model as it begins the stage, whose log-probabilities are measured once and kept in the
        run's folder; ``adapter``, the model without its adapters, asked in every step; ``none``: 0.
    smoothing: share of pairs that are taken to be labelled the wrong way round.
    lm_weight: of the mean cross-entropy of the chosen answer, added to the loss (as HA-DPO adds one for stability).
    segment_weight: of tokens in which the two answers differ, 1 for the others (RLHF-V's dense DPO).
    average: log p is the mean over tokens and not their sum.
    image_weight: of a second preference, for the image over a worse one with the same answer (mDPO).
    image_change: the worse image: a small piece of it (``crop``), or under step 500 of a diffusion (``noise``).
    anchor_weight, anchor: of -log sigmoid(beta (log p(chosen) - ref) - anchor), which keeps the chosen answer likely
        (mDPO).
    """

    source: ClassVar[str] = "DPO (NeurIPS 2023), equation 7"
    verified: ClassVar[str] = "paper; options: see the objective of each name"
    per: ClassVar[str] = "sample"
    pairs: ClassVar[bool] = True

    beta: float = 0.1
    reference: ReferenceKind = "start"
    smoothing: float = 0.0
    lm_weight: float = 0.0
    segment_weight: float = 1.0
    average: bool = False
    image_weight: float = 0.0
    image_change: Literal["crop", "noise"] = "crop"
    anchor_weight: float = 0.0
    anchor: float = 0.0

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        return Preference(**vars(self)).build()
