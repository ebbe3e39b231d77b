"""An encoder alone learns to name what a picture shows: ``objective: {use: classify, head: {use: ep}}``.

With ``train: {head: {...}}`` the encoder stays as it is and is probed; with ``vision`` beside it, it is fine-tuned. The
head stays in the stage's checkpoint, and the benchmark ``classification`` asks it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.data.batch import Batch
from vlm.data.errors import DataError
from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.head import Head
from vlm.models.vision_language import VisionLanguageModel
from vlm.training.loss import Loss


@dataclass(frozen=True)
class Classify:
    """Cross-entropy of a head on the encoder's features; classes are the tags of the data.

    head: linear, ep, vqt or another of the kind ``head``. labels: ``one``: every sample has one tag, its class
    (softmax); ``many``: it may have several (a yes or no for each class).
    """

    source: ClassVar[str] = "Efficient Probing (ICLR 2026), section 4; VQT (CVPR 2023), section 4"
    verified: ClassVar[str] = "definition; AdamW where the papers have LARS or Adam"
    per: ClassVar[str] = "sample"
    composed_only: ClassVar[bool] = True
    classifies: ClassVar[bool] = True

    head: Head
    labels: Literal["one", "many"] = "one"

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        if not isinstance(model, VisionLanguageModel):
            raise ModelError(
                "objective classify: it trains the encoder of a composed model by itself; found model.from"
            )
        if self.head.per_pixel:
            raise ModelError(
                f"objective classify: expected a head that classifies a picture; {type(self.head).__name__.lower()} "
                "classifies pixels"
            )
        if len(tags) < 2:
            raise DataError(
                "objective classify: expected samples with a 'tags' list and two classes or more; "
                f"found {len(tags) or 'none'}"
            )
        return ClassifyLoss(self.head.build(model.vision, len(tags)), tags, self.labels == "one")


class ClassifyLoss(nn.Module):
    """``head`` maps (encoder, images) to a logit of each of the classes ``tags``."""

    def __init__(self, head: nn.Module, tags: tuple[str, ...], one: bool) -> None:
        super().__init__()
        self.head, self.tags, self.one = head, tags, one
        self.place = {tag: number for number, tag in enumerate(tags)}

    def logits(
        self, model: VisionLanguageModel, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images classes"]:
        return self.head(model.vision, images).float()

    def forward(self, model: VisionLanguageModel, batch: Batch) -> Loss:
        if not len(batch.images):
            return self._without_images(model)
        logits = self.logits(model, batch.whole_images)
        truth = torch.zeros_like(logits)
        for image, row in enumerate(batch.image_owner.tolist()):
            truth[image, self._classes(batch.tags[row], batch.keys[row])] = 1.0
        each = (
            F.cross_entropy(logits, truth.argmax(1), reduction="none")
            if self.one
            else F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        )  # [N]
        right = truth.gather(1, logits.argmax(1, keepdim=True)).mean()  # the best class is one of the picture's
        return Loss(each.sum(), each.new_tensor(float(len(each))), {"top1": right.detach()})

    def _classes(self, tags: tuple[str, ...], key: str) -> list[int]:
        if self.one and len(tags) != 1:
            raise DataError(
                f"sample {key}: objective classify with labels: one: expected one tag, its class; found "
                f"{', '.join(tags) or 'none'} (labels: many takes several)"
            )
        return [self.place[tag] for tag in tags]

    def _without_images(self, model: VisionLanguageModel) -> Loss:
        """Two blank images times zero: another rank may wait to reduce the gradients of these parameters."""
        size, like = model.vision.image.size, next(self.head.parameters())
        blank = self.logits(model, like.new_zeros(2, 3, size, size))
        return Loss(blank.sum() * 0.0, like.new_zeros((), dtype=torch.float32), {})
