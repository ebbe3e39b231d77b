"""Backbones and heads against the authors' modules: keys and shapes of their state dicts, and what they return.

Goldens are made with weights and inputs that are functions of a key and a seed (tests/golden/backbones; numbers only).
"""

import pytest
import timm
import torch

from vlm.models.backbones.dependencyvit import Dependencyvit, ReversedAttention
from vlm.models.backbones.dynamic_perceiver import DynamicPerceiver
from vlm.models.backbones.grouped_vit import GroupedAttention, group_attention
from vlm.models.backbones.metaspikeformer import Metaspikeformer, SpikeAttention
from vlm.models.backbones.sparsifiner import Sparsifiner
from vlm.models.heads.ep import EfficientProbing
from vlm.models.heads.vwformer import VaryingWindowHead

WHOLE = {
    Sparsifiner: {"s": "sparsifiner_s_rn6_rc2", "b": "sparsifiner_b_rn6_rc2"},
    Dependencyvit: {name: f"dependencyvit_{name}" for name in ("tiny", "small", "lite_tiny")},
    Metaspikeformer: {
        "15m": "metaspikformer_8_256_embed64_128_256_360",
        "31m": "metaspikformer_8_384",
        "55m": "metaspikformer_8_512",
        "55m_distilled": "metaspikformer_8_512_kd",
        "124m": "metaspikformer_8_768",
    },
    DynamicPerceiver: {
        "reg400m": "reg400m_perceiver_t128",
        "reg800m": "reg800m_perceiver_t128",
        "reg1.6g": "reg1x6g_perceiver_t128",
        "reg3.2g": "reg3x2g_perceiver_t128",
        "resnet50_x0.375": "resnet50_0375_perceiver_t128",
        "resnet50_x0.5": "resnet50_050_perceiver_t128",
        "resnet50": "resnet50_perceiver_t128",
        "mobilenetv3_x0.75": "mobilenetV3_0x75_perceiver_t128",
        "mobilenetv3": "mobilenetV3_perceiver_t128",
    },
}


@pytest.mark.parametrize(
    ("backbone", "variant", "file"),
    [(kind, variant, file) for kind, files in WHOLE.items() for variant, file in files.items()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_published_weights_fit(backbone, variant, file, entries, published):
    with torch.device("meta"):
        assert entries(backbone.whole(variant)) == published(file)


def test_every_published_variant_is_compared():
    new = {"lite_small"}  # a size that the third party did not make
    for backbone, files in WHOLE.items():
        assert set(backbone.variants) - new == set(files)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_a_grouped_vit_has_the_published_keys(size, entries, published):
    with torch.device("meta"):
        vit = timm.create_model(f"vit_{size}_patch16_224")
        group_attention(vit, kind="gqa")
    assert entries(vit) == published(f"kdgqa_vit_{size[0]}_gqa")


@torch.no_grad()
@pytest.mark.parametrize(("queries", "reduce"), [(32, 1), (16, 4), (1, 1)])
def test_efficient_probing(queries, reduce, filled, drawn, off, entries, published):
    module, name = EfficientProbing(768, queries, reduce), f"ep_d768_q{queries}_dout{reduce}"
    assert entries(module) == published(name)
    if queries > 1:
        assert off(filled(module)(drawn(1, 2, 196, 768)), name) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "kdgqa", "dgqa_diff"])
def test_grouped_attention(kind, filled, drawn, off, entries, published):
    module = GroupedAttention(384, 12, 6, kind)
    if kind != "dgqa_diff":  # it also keeps the sizes of its groups
        assert entries(module) == published(f"{kind}_attn_d384_h12")
    assert off(filled(module)(drawn(1, 2, 50, 384)), f"{kind}_attn_d384_h12_kv6") < 1e-5


@torch.no_grad()
def test_varying_windows(filled, drawn, off, entries, published):
    widths = {"tiny": (96, 192, 384, 768), "base": (128, 256, 512, 1024)}
    for size, each in widths.items():
        with torch.device("meta"):
            assert entries(VaryingWindowHead(each, 150)) == published(f"vwhead_{size}_c512")
    strides = enumerate(zip(widths["tiny"], (4, 8, 16, 32), strict=True))
    maps = [drawn(level, 1, width, 256 // stride, 256 // stride) for level, (width, stride) in strides]
    assert off(filled(VaryingWindowHead(widths["tiny"], 150)).decode(maps), "vwhead_tiny_c512") < 1e-5


@torch.no_grad()
def test_reversed_attention(filled, drawn, off):
    name = "reversed_attn_d96_h6_n49"
    said = filled(ReversedAttention(96, 6))(drawn(1, 2, 49, 96), torch.ones(2, 49))
    assert off(said.out, name) < 1e-5
    assert off(said.voice, name, "m") < 1e-5
    assert off(said.received, name, "received") < 1e-5


@torch.no_grad()
def test_sparsifiner(filled, drawn, off):
    model = filled(Sparsifiner.whole("s"))
    assert off(model(drawn(0, 1, 3, 224, 224)), "sparsifiner_s_rn6_rc2", "x") < 1e-4


@torch.no_grad()
def test_spikes(filled, drawn, off):
    # Nearly every number of these is a whole multiple: thresholds are hit alike, or an error is large.
    attention = filled(SpikeAttention(64, 8), gain=4.0, small=1.0)
    assert off(attention(4 * drawn(1, 2, 1, 64, 7, 7)), "sdsa_d64_h8_T2_7x7") < 1e-4
    model = filled(Metaspikeformer.whole("31m"), gain=4.0, small=1.0)
    assert off(model(drawn(0, 1, 3, 224, 224)), "metaspikformer_8_384", "logits") < 0.05


@torch.no_grad()
def test_four_exits(filled, drawn, off):
    model = filled(DynamicPerceiver.whole("resnet50_x0.5"))
    for number, logits in enumerate(model.exits(drawn(0, 1, 3, 224, 224))):
        assert off(logits, "resnet50_050_perceiver_t128", f"out{number}") < 1e-4
