"""The encoder learns to name what is in the picture: ``objective: tags``.

A small encoder trained only through the language model's loss stays blind for thousands of steps;
multi-label classification of each sample's ``tags`` teaches it to see first.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.data.errors import DataError
from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.vision_language import VisionLanguageModel
from vlm.training.loss import Loss


@dataclass(frozen=True)
class Tags:
    """Binary cross-entropy of every tag on the log-sum-exp over the image's tokens of a linear head.

    prior: subtracted from each pooled logit, so that an untrained head starts near "absent".
    """

    source: ClassVar[str] = "multi-label pooling: Pinheiro and Collobert (CVPR 2015), section 3.2"
    verified: ClassVar[str] = "definition"
    per: ClassVar[str] = "sample"
    composed_only: ClassVar[bool] = True

    prior: float = 1.0

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        if not isinstance(model, VisionLanguageModel):
            raise ModelError("objective tags: it trains the encoder of a composed model by itself; found model.from")
        if not tags:
            raise DataError("objective tags: the data has no tags; expected samples with a 'tags' list, found none")
        return TagsLoss(model.vision.dim, tags, self.prior)


class TagsLoss(nn.Module):
    """The head is trained with the encoder and thrown away with the stage."""

    def __init__(self, width: int, tags: tuple[str, ...], prior: float) -> None:
        super().__init__()
        self.head = nn.Linear(width, len(tags))
        self.place = {tag: i for i, tag in enumerate(tags)}
        self.prior = prior

    def forward(self, model: VisionLanguageModel, batch: Batch) -> Loss:
        if not len(batch.images):
            return self._without_images(model)
        pooled = self._pooled(model, batch.whole_images)
        truth = torch.zeros_like(pooled)
        for image, row in enumerate(batch.image_owner.tolist()):
            truth[image, [self.place[tag] for tag in batch.tags[row]]] = 1.0
        each = nn.functional.binary_cross_entropy_with_logits(pooled, truth, reduction="none").mean(1)  # [N]
        right = ((pooled > 0) == (truth > 0)).float().mean()
        return Loss(each.sum(), each.new_tensor(float(len(each))), {"tag_accuracy": right.detach()})

    def _pooled(
        self, model: VisionLanguageModel, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images tags"]:
        return self.head(model.vision(images).tokens).float().logsumexp(1) - self.prior

    def _without_images(self, model: VisionLanguageModel) -> Loss:
        """A blank image times zero: another rank may wait to reduce the gradients of these parameters."""
        size, zero = model.vision.image.size, self.head.weight.new_zeros((), dtype=torch.float32)
        blank = self.head.weight.new_zeros(1, 3, size, size)
        return Loss(self._pooled(model, blank).sum() * 0.0, zero, {})
