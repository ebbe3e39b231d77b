"""What an objective returns, and how a batch enters the model."""

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.models.base import BaseVlm
from vlm.models.vision_language import Inputs
from vlm.processed import ProcessedBatch


class Loss(NamedTuple):
    """value: the sum over what is supervised; weight: its total weight; logs: scalars to show, means over it."""

    value: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    logs: dict[str, Float[Tensor, ""]]


class Objective(Protocol):
    """A frozen dataclass in vlm/objectives; its fields are its recipe options.

    per: what the loss is averaged over in the whole global batch, ``"token"`` (loss weights) or ``"sample"``.
    ``build`` returns the module that computes a :class:`Loss` from (model, batch); its parameters train too.
    """

    per: str

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module: ...


def inputs_of(batch: Batch) -> Any:
    """The part of a batch that the model sees: :class:`Inputs`, or what a checkpoint's processor made."""
    if isinstance(batch, ProcessedBatch):
        return batch.inputs()
    place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    valid = place < batch.length[:, None]
    return Inputs(batch.tokens, valid, batch.images, batch.image_owner, batch.keys, batch.tiles, batch.pack)
