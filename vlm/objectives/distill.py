"""EPIC: Efficient multi-modal LLMs via progressive consistency distillation (NeurIPS 2025): ``objective: distill``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.models.base import BaseVlm, Supervised
from vlm.models.errors import ModelError
from vlm.models.lora import without_adapters
from vlm.models.program.observe import resting
from vlm.objectives._preference import evaluating
from vlm.training.loss import Loss, inputs_of


@dataclass(frozen=True)
class Distill:
    """The pruned model learns to say what it would say unpruned.

        share T^2 KL(teacher || student at temperature T) + (1 - share) cross-entropy, over supervised tokens

    The student runs under the recipe's ``prune``, whose ``schedule`` lowers the kept share step by step; the teacher is
    the same model in a pass without it and without gradient.

    weights: of the teacher: ``self``, the student's own at this step, or ``adapter``, the model without its adapters.
    """

    source: ClassVar[str] = "EPIC (2510.00515), equations 6 to 9 and official code"
    verified: ClassVar[str] = (
        "loss: code, second-hand; schedule: ours (the kept share falls linearly; the paper draws it at random in a "
        "moving range, moves the pruned layer too, and prunes its teacher a little)"
    )
    per: ClassVar[str] = "token"

    share: float = 0.7
    temperature: float = 2.0
    weights: Literal["self", "adapter"] = "self"

    def build(self, model: BaseVlm, tags: tuple[str, ...]) -> nn.Module:
        if not 0 <= self.share <= 1:
            raise ModelError(f"distill: share: expected 0 to 1; found {self.share:g}")
        if not self.temperature > 0:
            raise ModelError(f"distill: temperature: expected a number above 0; found {self.temperature:g}")
        return DistillLoss(self)


class DistillLoss(nn.Module):
    """It has no parameters of its own."""

    def __init__(self, options: Distill) -> None:
        super().__init__()
        self.options = options

    def forward(self, model: BaseVlm, batch: Batch) -> Loss:
        with _teaching(model, self.options.weights == "adapter"):
            teacher = model.supervised(inputs_of(batch), batch.weights)
        student = model.supervised(inputs_of(batch), batch.weights)
        _check_same(teacher, student)
        share, zero = self.options.share, student.logits.sum() * 0.0  # keeps every parameter in the graph
        kl = divergence(teacher.logits, student.logits, self.options.temperature)
        ce = nn.functional.cross_entropy(student.logits, student.target, reduction="none")
        weight = student.weight.sum()
        value = ((share * kl + (1 - share) * ce) * student.weight).sum() + zero
        terms = {"kl": kl, "cross_entropy": ce}
        logs = {name: (each.detach() * student.weight).sum() / weight.clamp_min(1e-6) for name, each in terms.items()}
        return Loss(value, weight, logs)


@contextmanager
def _teaching(model: BaseVlm, without: bool) -> Iterator[None]:
    with evaluating(model), resting(model):
        if not without:
            yield
            return
        with without_adapters(model):
            yield


def divergence(
    teacher: Float[Tensor, "rows vocab"], student: Float[Tensor, "rows vocab"], temperature: float
) -> Float[Tensor, " rows"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row; the factor keeps gradients of one size.

    Source: Distilling the knowledge in a neural network (2015), section 2.
    """
    said, learned = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * (said.exp() * (said - learned)).sum(-1)


def _check_same(teacher: Supervised, student: Supervised) -> None:
    """Pruning takes visual tokens alone, so both passes predict the same tokens in the same order."""
    if not (torch.equal(teacher.row, student.row) and torch.equal(teacher.place, student.place)):
        raise ModelError("distill: expected a program that leaves every text token; found one that drops some")
