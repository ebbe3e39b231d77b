"""Next-token prediction of what the assistant says: ``objective: chat``, the default of a stage."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlm.data.batch import Batch
from vlm.models.base import BaseVlm
from vlm.training.loss import Loss, inputs_of


@dataclass(frozen=True)
class Chat:
    """Token-weighted cross-entropy of the assistant turns."""

    source: ClassVar[str] = "LLaVA (NeurIPS 2023), section 4.2"
    verified: ClassVar[str] = "definition"
    per: ClassVar[str] = "token"
    packs: ClassVar[bool] = True

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        return ChatLoss()


class ChatLoss(nn.Module):
    """It has no parameters of its own."""

    def forward(self, model: BaseVlm, batch: Batch) -> Loss:
        out = model(inputs_of(batch), batch.weights)
        return Loss(out.loss, out.weight, {})
