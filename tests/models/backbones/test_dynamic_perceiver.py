"""Exits that are computed when asked for, latents as tokens, and thresholds that share samples out."""

import pytest
import torch

from vlm.models.backbones.dynamic_perceiver import DynamicPerceiver, exit_thresholds, leaves_at
from vlm.models.errors import ModelError

SMALL = {"depths": (1, 1, 1, 1), "widths": (16, 24, 32, 40), "classes": 7}


@torch.no_grad()
def test_an_early_exit_runs_no_later_stage():
    network = DynamicPerceiver.whole("reg400m", **SMALL).eval()
    ran = []
    for name in ("self_att3", "self_att4", "cnn_body.block3", "cnn_body.block4", "last_cross_att_z2x"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    exits = network.exits(torch.randn(2, 3, 64, 64))
    first = next(exits)
    assert first.shape == (2, 7) and ran == ["self_att3"]
    next(exits)
    assert ran == ["self_att3", "cnn_body.block3", "self_att4"]
    assert [one.shape for one in exits] == [(2, 7)] * 2
    assert ran[3:] == ["cnn_body.block4", "last_cross_att_z2x"]


@torch.no_grad()
def test_latents_are_tokens_of_no_place():
    images = torch.randn(2, 3, 64, 96)
    latents = DynamicPerceiver("reg400m", layer=-1, config=SMALL | {"latents": True}).eval()
    grid = DynamicPerceiver("reg400m", layer=-2, config=SMALL).eval()
    assert (latents.spatial, latents(images).tokens.shape) == (False, (2, 16, 32))
    found = grid(images)
    assert (grid.spatial, found.grid, found.tokens.shape) == (True, (4, 6), (2, 24, 32))
    names = {name.partition(".")[0] for name, _ in grid.named_parameters(prefix="")}
    assert names == {"model"}
    assert not any("self_att4.0" in name or "classifier" in name for name, _ in grid.named_parameters())


def test_thresholds_share_samples_out():
    torch.manual_seed(0)
    confidence = torch.rand(200, 4)
    thresholds = exit_thresholds(confidence, (0.3, 0.2, 0.1, 0.4))
    assert leaves_at(confidence, thresholds).bincount().tolist() == [60, 40, 20, 80]
    assert thresholds[3] == -torch.inf
    assert leaves_at(confidence, exit_thresholds(confidence, (0.0, 1.0, 0.0, 0.0))).tolist() == [1] * 200


def test_a_trunk_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match="has regnet, resnet50 and mobilenetv3; found 'vgg'"):
        DynamicPerceiver.whole("reg400m", trunk="vgg")
