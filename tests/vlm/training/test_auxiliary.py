"""Losses that an encoder brings itself: how they enter a step, and a recipe whose router trains by one."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlm.models.encoder import Auxiliary
from vlm.training import checkpoints
from vlm.training.auxiliary import added, noting
from vlm.training.loss import Loss

MOH = {"dims": [12, 24, 48, 96], "depths": [1, 1, 2, 1], "shared": [2, 1, 2, 3], "routed": [0, 1, 3, 4], "head_dim": 6}
SHORT = ["stages.0.steps=2", "stages.1.steps=2", "stages.0.schedule.warmup=0", "stages.1.schedule.warmup=0"]


def vision(**options):
    return f"model.vision={json.dumps({'use': 'moh', 'variant': 'base_75', 'image': 64, 'config': MOH} | options)}"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    @contextmanager
    def auxiliary(self):
        values = []
        self.note = lambda: values.append(self.weight**2)
        yield {"load": Auxiliary(0.5, values)}


@pytest.mark.parametrize("pictures", [3, 0])
def test_a_term_counts_as_its_share_for_every_unit_of_the_loss(pictures):
    model = SimpleNamespace(vision=Encoder())
    with noting(model) as terms:
        model.vision.note()
        model.vision.note()
    value = torch.tensor(7.0) + 0 * model.vision.weight
    loss = added(Loss(value, torch.tensor(10.0), {"a": value}), terms, SimpleNamespace(images=torch.zeros(pictures)))
    loss.value.backward()
    assert loss.weight == 10
    assert loss.value == (7 + 10 * 0.5 * 4 if pictures else 7)
    assert model.vision.weight.grad == (10 * 0.5 * 4 if pictures else 0)  # in the graph all the same
    assert {name: float(log) for name, log in loss.logs.items()} == {"a": 7} | ({"load": 4} if pictures else {})


def test_a_frozen_encoder_and_one_without_a_loss_are_not_asked():
    frozen = Encoder().requires_grad_(False)
    for model in (SimpleNamespace(vision=frozen), SimpleNamespace(vision=nn.Linear(1, 1)), SimpleNamespace()):
        with noting(model) as terms:
            assert terms == {}
        loss = Loss(torch.tensor(1.0), torch.tensor(1.0), {})
        assert added(loss, terms, None) is loss


def test_a_recipe_trains_the_router_by_its_balance(train):
    folders = {share: train(vision(balance=share), *SHORT, to=f"run{share}") for share in (0, 100)}
    without, balanced = (lines(folder) for folder in folders.values())
    assert all("balance" not in line for line in without)
    assert ["balance" in line for line in balanced] == [
        True,
        True,
        False,
        False,
    ]  # the second stage freezes the encoder
    first = balanced[0]
    assert first["loss"] == pytest.approx(without[0]["loss"] + 100 * first["balance"], rel=1e-4)
    states = [
        checkpoints.read(sorted((folder / "checkpoints").glob("*.ckpt"))[0])["state_dict"]
        for folder in folders.values()
    ]
    routers = [key for key in states[0] if key.endswith("attn.wg.weight")]
    assert len(routers) == 3  # layer -2: stages 1 to 3 route in 1, 2 and 3
    assert all(not torch.equal(states[0][key], states[1][key]) for key in routers)


def test_compiled_blocks_learn_the_same_behind_a_backbone(train, monkeypatch):
    """``run.compile`` compiles the decoder's blocks and leaves the encoder as it is; traced only, for time."""
    original, compiled = nn.Module.compile, []

    def traced(self, **options):
        compiled.append(type(self).__name__)
        original(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced)
    how = [vision(), *SHORT, "stages.1.train.vision={lr: 1e-3}"]
    expected, found = (
        checkpoints.read(sorted((train(*how, *more, to=to) / "checkpoints").glob("*.ckpt"))[-1])["state_dict"]
        for to, more in (("one", []), ("two", ["run.compile=true"]))
    )
    assert set(compiled) == {"LlamaDecoderLayer"}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
