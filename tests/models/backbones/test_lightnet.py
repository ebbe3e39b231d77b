"""Additive attention: one sum for all tokens, the same in any order; decays of the positions written out."""

import pytest
import torch
from torch.nn import functional as F

from vlm.models.backbones.lightnet import AxialDecay, Lightnet, LightNetMixer, turned
from vlm.models.errors import ModelError


def pair(extra_zero: bool = False) -> tuple[LightNetMixer, LightNetMixer]:
    torch.manual_seed(0)
    whole = LightNetMixer(12, 2, extra_zero=extra_zero).double()
    causal = LightNetMixer(12, 2, causal=True, extra_zero=extra_zero).double()
    causal.load_state_dict(whole.state_dict())
    return whole, causal


@torch.no_grad()
@pytest.mark.parametrize("extra_zero", [False, True])
def test_it_is_a_softmax_over_tokens_of_each_channel(extra_zero):
    whole, _ = pair(extra_zero)
    q, k, v = torch.randn(3, 2, 2, 7, 6).double()
    share = k.exp() / (k.exp().sum(2, keepdim=True) + extra_zero)
    dense = torch.einsum("nhtd,nhsd,nhse->nhte", q, share, v)
    torch.testing.assert_close(whole.mix(q, k, v), dense)


@torch.no_grad()
@pytest.mark.parametrize("extra_zero", [False, True])
@pytest.mark.parametrize("places", [None, torch.arange(7)[:, None]])
def test_causal_rows_are_the_form_without_order_of_what_came_before(extra_zero, places):
    whole, causal = pair(extra_zero)
    x = torch.randn(2, 7, 12).double()
    found = causal(x, places)
    for length in (1, 3, 7):
        before = whole(x[:, :length], None if places is None else places[:length])
        torch.testing.assert_close(found[:, length - 1], before[:, -1])


@torch.no_grad()
def test_without_positions_tokens_have_no_order():
    whole, _ = pair()
    x, order = torch.randn(2, 7, 12).double(), torch.randperm(7)
    torch.testing.assert_close(whole(x[:, order]), whole(x)[:, order])


def test_turned_products_depend_on_distance():
    x = torch.randn(1, 1, 1, 8).double().expand(1, 1, 4, 8)
    places = torch.tensor([[0, 0], [2, 1], [3, 5], [5, 6]])  # the second pair is as far apart as the first
    q = turned(x, places)
    products = (q @ q.transpose(2, 3))[0, 0]
    torch.testing.assert_close(products[0, 1], products[2, 3])
    assert (products[0, 1] - products[0, 2]).abs() > 1e-3
    torch.testing.assert_close(products[0, 0], x[0, 0, 0].square().sum())


@torch.no_grad()
def test_a_position_is_a_decaying_sum_along_each_axis():
    torch.manual_seed(0)
    position, x = AxialDecay(6, 2).double(), torch.randn(1, 3, 4, 6).double()
    expected = torch.zeros_like(x)
    for axis in (0, 1):
        decay = position.decay[axis].sigmoid().repeat_interleave(3)  # of each channel
        summed = torch.zeros_like(x)
        for row in range(3):
            for col in range(4):
                for back in range((row, col)[axis] + 1):
                    before = (row - back, col) if axis == 0 else (row, col - back)
                    summed[0, row, col] += decay**back * x[0, before[0], before[1]]
        summed = summed * position.q[axis] * position.k[axis]
        expected += position.proj[axis](F.rms_norm(summed, (6,), position.norm[axis].weight))
    torch.testing.assert_close(position(x), expected)


def test_sizes_are_those_of_the_paper_within_two_percent():
    for variant, millions in {"tiny": 6.09, "small": 22.64, "base": 87.74}.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in Lightnet.whole(variant).parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.02)
    with pytest.raises(ModelError, match="position is tpe, lrpe, both or none; found 'rope'"):
        Lightnet("tiny", config={"position": "rope"})
