"""A pruned model that learns from itself unpruned, against dense passes."""

from typing import Any

import pytest
import torch

from vlm.data.batch import Batch
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.observe import resting
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random
from vlm.objectives.distill import Distill, divergence


@pytest.fixture
def learned(batch: Any) -> Batch:
    inputs = batch("tt#ttt", "t#tttttt")
    weights = torch.zeros(inputs.tokens.shape)
    weights[0, 4:6], weights[1, 4:8] = 1.0, 0.5
    return Batch(
        inputs.tokens.masked_fill(~inputs.valid, 0),
        inputs.valid.sum(1),
        weights,
        inputs.images,
        inputs.owner,
        ["a", "b"],
        [(), ()],
    )


@pytest.mark.parametrize("keep", [Budget(ratio=1.0)])
def test_at_the_full_budget_teacher_and_student_are_one(keep: Budget, make_model: Any, learned: Batch) -> None:
    model = make_model(layers=3)
    for pruner in (Random(keep=keep), Fastv(keep=keep)):
        with attach(model, pruner.program(model.facts)):
            found = Distill(share=1.0).build(model, ())(model, learned)
        assert float(found.value.detach()) == 0 == float(found.logs["kl"])


def test_loss_and_gradient_against_passes_by_hand(make_model: Any, learned: Batch) -> None:
    """Student and teacher as two models; the pruned one keeps what the program keeps, so only its loss is restated."""
    model, teacher = make_model(layers=3), make_model(layers=3)
    program = Random(keep=Budget(ratio=0.25)).program(model.facts)
    from vlm.training.loss import inputs_of

    with attach(model, program):
        found = Distill(share=0.6, temperature=2.0).build(model, ())(model, learned)
        found.value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        student = model.supervised(inputs_of(learned), learned.weights)
    said = (teacher.supervised(inputs_of(learned), learned.weights).logits.double() / 2).softmax(-1).detach()
    logits = student.logits.double()
    total = torch.zeros((), dtype=torch.float64)
    for row, target, weight, truth in zip(logits, student.target, student.weight, said, strict=True):
        ours = (row / 2).softmax(-1)
        kl = 4 * (truth * (truth / ours).log()).sum()
        total = total + weight * (0.6 * kl - 0.4 * row.softmax(-1)[target].log())
    total.backward()
    assert float(found.weight) == 4
    assert float(found.logs["kl"]) > 1e-3
    torch.testing.assert_close(found.value.double(), total, atol=0, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pruner", [Random(keep=Budget(ratio=0.25)), Fastv(keep=Budget(ratio=0.25))])
def test_a_resting_program_leaves_the_bare_model_and_acts_again_after(pruner: Any, make_model: Any, batch: Any) -> None:
    model, inputs = make_model(layers=3), batch("tt#ttt", "t#tt")
    bare = model(inputs).hidden
    with attach(model, pruner.program(model.facts)):
        pruned = model(inputs).hidden
        with resting(model):
            torch.testing.assert_close(model(inputs).hidden, bare, atol=1e-12, rtol=1e-12)
        assert torch.equal(model(inputs).hidden, pruned)
    assert pruned.shape[1] < bare.shape[1]
    with resting(model):
        assert torch.equal(model(inputs).hidden, bare)


def test_the_divergence_in_numbers() -> None:
    teacher, student = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    p = 1 / (1 + torch.tensor(1.0).exp())  # of logits 0 and 2 at temperature 2
    expected = 4 * (p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log())
    torch.testing.assert_close(divergence(teacher, student, 2.0), torch.stack([expected, torch.tensor(0.0)]))


def test_options_that_make_no_loss(make_model: Any) -> None:
    for wrong, message in ((Distill(share=1.5), "share: expected 0 to 1"), (Distill(temperature=0.0), "above 0")):
        with pytest.raises(ModelError, match=message):
            wrong.build(make_model(layers=2), ())
