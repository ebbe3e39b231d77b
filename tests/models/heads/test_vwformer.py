"""Windows of varying context: what a context is, and what it is made of."""

import pytest
import torch
from torch import nn

from vlm.models.backbones.dynamic_perceiver import DynamicPerceiver
from vlm.models.backbones.metaspikeformer import Metaspikeformer
from vlm.models.errors import ModelError
from vlm.models.heads.vwformer import VaryingWindowHead, Vwformer, copy_shift, join, windows


def test_windows_join_to_what_they_were():
    x = torch.randn(2, 3, 16, 24)
    cut = windows(x, (2, 3), (2, 3))
    assert cut.shape == (2 * 64, 3, 2, 3)
    assert torch.equal(cut[64 + 8 + 1], x[1, :, 2:4, 3:6])  # of the second sample: second row, second column
    assert torch.equal(join(cut, 2), x)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_context_is_around_its_window_and_padding_is_of_the_map(ratio):
    x = torch.arange(64.0 * 64).reshape(1, 1, 64, 64)
    padded = copy_shift(x, ratio)
    side = (ratio - 1) * 8 // 2
    assert padded.shape[2:] == (64 + 2 * side, 64 + 2 * side)
    assert torch.equal(padded[..., side:-side, side:-side], x)
    context = windows(padded, (8 * ratio, 8 * ratio), (8, 8))
    assert torch.equal(context[3 * 8 + 4, 0, side : side + 8, side : side + 8], x[0, 0, 24:32, 32:40])
    # the strip on the left continues where the first context ends inside the map
    assert torch.equal(padded[0, 0, side, :side], x[0, 0, 0, (ratio + 1) * 4 : ratio * 8])


def test_a_context_of_one_window_is_window_attention():
    torch.manual_seed(0)
    head = VaryingWindowHead((8, 8, 8, 8), 5, dim=16, ratios=(1,)).double().eval()
    head.ds[0] = nn.Identity()  # nothing to scale
    head.attn[0].conv_out.bn.weight.data.fill_(1.0)
    x = torch.randn(2, 16, 16, 16).double()
    layer = head.attn[0]
    own = x[1, :, 4:6, 6:8].flatten(1)[None]  # one window, [1,16,4]
    q, k, v = (f(own.unflatten(2, (2, 2))).flatten(2) for f in (layer.theta, layer.phi, layer.g))
    out = v @ (q.transpose(1, 2) @ k * 16**-0.5).softmax(-1).transpose(1, 2)
    expected = layer.conv_out(out.unflatten(2, (2, 2)))[0] + x[1, :, 4:6, 6:8]
    torch.testing.assert_close(head.look(x, 0)[1, :, 4:6, 6:8], expected)


def test_maps_that_have_no_windows_are_refused():
    head = VaryingWindowHead((8, 8, 8, 8), 5, dim=64).eval()
    with pytest.raises(ModelError, match="multiples of 8; found 12 x 16"):
        head.decode([torch.randn(1, 8, 96 // s, 128 // s) for s in (4, 8, 16, 32)])
    with pytest.raises(ModelError, match="strides 4, 8, 16 and 32; found Identity"):
        Vwformer().build(nn.Identity(), 5)
    with pytest.raises(ModelError, match="found Metaspikeformer of strides 2, 4, 8, 16, 16"):
        Vwformer().build(Metaspikeformer("15m", layer=-1, config={"dims": (8, 8, 8, 8), "depths": (1, 1)}), 5)


def test_it_reads_the_maps_of_a_backbone():
    sizes = {"depths": (1, 1, 1, 1), "widths": (16, 24, 32, 40), "classes": 7}
    encoder = DynamicPerceiver("reg400m", layer=-1, config=sizes).eval()
    head = Vwformer(width=64).build(encoder, 5).eval()
    assert head(encoder, torch.randn(2, 3, 64, 128)).shape == (2, 5, 16, 32)
    with pytest.raises(ModelError, match="whole"):
        Vwformer().build(DynamicPerceiver("reg400m", layer=-2, config=sizes), 5)
