"""The loss in parts: the plain one in value and gradient, and no tensor of all logits ever exists."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm.models import loss as module
from vlm.models.lora import Lora, adapt
from vlm.models.loss import summed_loss

ROWS, WIDTH, WORDS = 37, 6, 50


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that anything makes."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.found = max([self.found, *sizes])
        return out


class CappedHead(nn.Module):
    """A head whose scores are bounded, as Gemma's are, with a bias."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WORDS)

    def forward(self, hidden):
        return torch.tanh(self.inner(hidden) / 3) * 3


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(0, WORDS, (ROWS,)), torch.rand(ROWS, dtype=torch.float64)


def plain(hidden, target, weight, head):
    return -(head(hidden).log_softmax(1)[torch.arange(len(target)), target] * weight).sum()


@pytest.mark.parametrize("rows", [1, 5, ROWS, 10**6])
@pytest.mark.parametrize("make", [lambda: nn.Linear(WIDTH, WORDS, bias=False), CappedHead])
def test_parts_are_the_whole(case, monkeypatch, rows, make):
    head = make().double()
    monkeypatch.setattr(module, "LOGITS", rows * WORDS)
    variables = [case[0], *head.parameters()]
    found, expected = summed_loss(*case, head, WORDS), plain(*case, head)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    pairs = zip(torch.autograd.grad(3 * found, variables), torch.autograd.grad(3 * expected, variables), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_no_tensor_of_all_logits_exists(case, monkeypatch):
    """Forward and backward; the same meter sees them where the batch is one part."""
    head = nn.Linear(WIDTH, WORDS, bias=False).double()
    for rows, expected in ((4, max(4 * WORDS, WIDTH * WORDS)), (ROWS, ROWS * WORDS)):
        monkeypatch.setattr(module, "LOGITS", rows * WORDS)
        with Largest() as meter:
            summed_loss(*case, head, WORDS).backward()
        assert meter.found == expected
    assert WIDTH * WORDS < ROWS * WORDS


def test_single_precision_inside_half(case):
    hidden, target, weight = case[0].detach().bfloat16(), case[1], case[2].float()
    head = nn.Linear(WIDTH, WORDS, bias=False).bfloat16()
    found = summed_loss(hidden, target, weight, head, WORDS)
    expected = plain(hidden, target, weight, lambda x: head(x).double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_frozen_head_costs_no_gradient(case, monkeypatch):
    head = nn.Linear(WIDTH, WORDS).double().requires_grad_(False)
    monkeypatch.setattr(module, "LOGITS", 5 * WORDS)
    summed_loss(*case, head, WORDS).backward()
    assert head.weight.grad is None and case[0].grad.abs().sum() > 0


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_trains_the_same_in_parts(make_model, batch, monkeypatch, adapted):
    model, inputs = make_model(), batch("tt#ttt", "tttt", "#ttt")
    if adapted:
        torch.manual_seed(1)
        adapt(model.parts["language"], "language", Lora(2, 4.0, 0.0), model.head)
        model.double()
    weights = (1.0 + torch.arange(inputs.tokens.numel()).view_as(inputs.tokens) % 3) * (inputs.tokens >= 0)
    grads = []
    for rows in (10**6, 2):
        monkeypatch.setattr(module, "LOGITS", rows * 40)
        out = model(inputs, weights * inputs.valid)
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=0, atol=1e-11, msg=name)


def test_liger_is_taken_where_it_means_the_same(case, monkeypatch):
    """On a GPU, for a plain matrix and even weights; the conditions are looked at without one."""
    monkeypatch.setattr(module, "_liger", lambda: object())

    class Rows:
        is_cuda = True

    even, head = torch.ones(3), nn.Linear(WIDTH, WORDS, bias=False)
    assert module._liger_fits(Rows(), even, head)
    assert not module._liger_fits(case[0], even, head)
    assert not module._liger_fits(Rows(), torch.tensor([1.0, 1.0, 0.5]), head)
    assert not module._liger_fits(Rows(), even, CappedHead())
    monkeypatch.setattr(module, "_liger", lambda: None)
    assert not module._liger_fits(Rows(), even, head)


def test_liger_is_called_for_the_sum(case, monkeypatch):
    """Its call, with its sum written out in place of its kernel."""
    seen = []

    def kernel(hidden, weight, target, bias, reduction):
        seen.append((bias, reduction))
        return nn.functional.cross_entropy(nn.functional.linear(hidden, weight, bias), target, reduction=reduction)

    monkeypatch.setattr(module, "_liger", lambda: kernel)
    monkeypatch.setattr(module, "_liger_fits", lambda *_: True)
    head = nn.Linear(WIDTH, WORDS, bias=False).double()
    weight = torch.full((ROWS,), 0.5, dtype=torch.float64)
    found = summed_loss(case[0], case[1], weight, head, WORDS, head)
    torch.testing.assert_close(found.double(), plain(case[0], case[1], weight, head), rtol=1e-6, atol=0)
    assert seen == [(None, "sum")]
