"""Blocks of the backbones where they must come to something simpler."""

import pytest
import torch
from torch.nn import functional as F

from vlm.models.backbones.biformer import RoutedAttention
from vlm.models.backbones.litv2 import HiLo
from vlm.models.backbones.nat import NeighborhoodAttention
from vlm.models.backbones.overlock import OverlockNet
from vlm.models.backbones.vsa import VariedSizeWindowAttention
from vlm.models.contmix import ContMix, ContMixBlock


@torch.no_grad()
def test_routing_to_every_region_is_full_attention():
    module, x = RoutedAttention(16, 2, topk=49), torch.randn(2, 14, 21, 16)
    q, k, v = module.qkv["qkv"](x).flatten(1, 2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    full = F.scaled_dot_product_attention(q, k, v, scale=16**-0.5).transpose(1, 2).reshape(x.shape)
    lepe = module.lepe(v.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(module(x), module.wo(full + lepe), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hilo_without_low_heads_is_attention_within_windows():
    module, x = HiLo(16, 4, window=2, share=0.0), torch.randn(1, 4, 6, 16)
    out = module(x)
    square = module(x[:, 2:4, 4:6])
    torch.testing.assert_close(out[:, 2:4, 4:6], square)
    assert not hasattr(module, "l_q")


@torch.no_grad()
def test_windows_that_do_not_move_are_swin_windows():
    module = VariedSizeWindowAttention(8, 8, 2).double()
    module.zero_predictors()
    x = torch.randn(1, 8, 14, 21, dtype=torch.float64)
    moved = x.clone()
    moved[:, :, :7, :7] = torch.randn(8, 7, 7, dtype=torch.float64)  # another window
    torch.testing.assert_close(module(x)[:, :, 7:, 7:], module(moved)[:, :, 7:, 7:])
    rows, cols = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 21), indexing="ij")
    places = module.places(x, 14, 21)
    torch.testing.assert_close(places[0], torch.stack([cols, rows], -1).double(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_dilated_neighborhood_is_one_on_each_grid_of_every_other_place():
    dilated, plain = NeighborhoodAttention(8, 2, 3, dilation=2), NeighborhoodAttention(8, 2, 3)
    plain.load_state_dict(dilated.state_dict())
    x = torch.randn(1, 9, 10, 8)
    for i in (0, 1):
        for j in (0, 1):
            torch.testing.assert_close(dilated(x)[:, i::2, j::2], plain(x[:, i::2, j::2]))


@torch.no_grad()
def test_even_kernels_average_over_the_window():
    block = ContMixBlock(8, 4, 1, 5, 5, 2, first=True, merged=False, drop=0.0).eval()
    for parameter in block.weight_proj.parameters():
        torch.nn.init.zeros_(parameter)
    x, z = torch.randn(1, 8, 9, 9), torch.randn(1, 12, 9, 9)
    torch.testing.assert_close(block.mix(x, z)[:, :, 2:-2, 2:-2], F.avg_pool2d(x, 5, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [64, 96])
def test_merged_convolutions_do_the_same(side):
    net = OverlockNet((8, 8, 16, 16), (1, 1, 1, 1), (2, 1), (2, 2)).eval()
    for key, value in net.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, side, side)
    before = [value.clone() for value in net.maps(images)]
    for value, merged in zip(before, net.merge().maps(images), strict=True):
        torch.testing.assert_close(merged, value, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_block_with_dynamic_kernels_takes_maps_smaller_than_its_window():
    block = ContMix(8, 1, 9, scale=1.0).eval()
    assert block(torch.randn(2, 8, 5, 12)).shape == (2, 8, 5, 12)
    assert block.enlarged(torch.randn(1, 8, 5, 12)).shape[2:] == (9, 21)
