"""``impl="auto"`` of dense, elementwise and grouped-mass attention makes no tensor of rows x keys."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm.kernels import dense, elementwise, grouped_mass
from vlm.kernels.dense import dense_attention
from vlm.kernels.dispatch import Call
from vlm.kernels.elementwise import elementwise_attention
from vlm.kernels.grouped_mass import grouped_mass_attention
from vlm.kernels.grouped_mass.rules import visual_redistribution

LENGTH = 1536


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation inside gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(given) if isinstance(x, torch.Tensor))])
        return given


GROUPS = torch.arange(LENGTH)[None] // 100 % 4
CALLS = {
    "dense": dense_attention,
    "dense with log-sum-exp": lambda *x, **common: dense_attention(*x, return_lse=True, **common)[0],
    "sigmoid": lambda *x, **common: elementwise_attention(*x, normalizer="count", **common),
    "grouped": lambda *x, **common: grouped_mass_attention(*x, GROUPS, rule=visual_redistribution(), **common)[0],
}
DOCUMENTS = torch.arange(LENGTH)[None] // 500
COMMONS = {
    "causal": {},
    "full": {"causal": False},
    "padded": {"key_valid": torch.arange(LENGTH)[None] > 9},
    "packed": {"q_doc": DOCUMENTS, "k_doc": DOCUMENTS},
}


@pytest.mark.parametrize("common", COMMONS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("dim", "value_dim"), [(2, 2), (2, 1)])
def test_on_a_cpu(call, common, dim, value_dim):
    q, k = torch.randn(2, 1, 2, LENGTH, dim, dtype=torch.float32)
    with Largest() as seen:
        CALLS[call](q, k[:, :1], k[:, :1, :, :value_dim], **COMMONS[common])
    assert 0 < seen.elements < LENGTH * LENGTH / 2


@pytest.mark.parametrize("call", CALLS)
def test_nor_in_the_backward(call):
    q, k = (torch.randn(1, 1, LENGTH, 2, requires_grad=True) for _ in range(2))
    with Largest() as seen:
        CALLS[call](q, k, k, **COMMONS["padded"]).sum().backward()
    assert 0 < seen.elements < LENGTH * LENGTH / 2


def test_the_measure_sees_the_score_matrix():
    q = torch.randn(1, 1, LENGTH, 2)
    with Largest() as seen:
        dense_attention(q, q, q, impl="reference")
    assert seen.elements >= LENGTH * LENGTH


@pytest.mark.parametrize("op", [dense, elementwise, grouped_mass])
def test_the_reference_is_never_chosen(op):
    devices, types = map(torch.device, ("cpu", "cuda", "mps")), (torch.float64, torch.float32, torch.bfloat16)
    sizes, wishes = ((64, 64), (8, 8), (80, 33), (512, 512)), ({}, {"lse": True, "fn": "relu"}, {"plain": False})
    for device, dtype, grad, dims, more in itertools.product(devices, types, (False, True), sizes, wishes):
        choice = op.explain(Call(device, dtype, grad, *dims, more=more))
        assert choice.chosen != "reference"
        assert choice.chosen != "flex" or device.type == "cuda"
