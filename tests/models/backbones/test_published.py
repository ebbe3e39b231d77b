"""Backbones against the authors' modules: keys, shapes and parameters of every variant, and what they return."""

import pytest
import torch

from vlm.models.aggregated import ConvGlu
from vlm.models.backbones.biformer import Biformer, RefactoredRoutedAttention
from vlm.models.backbones.litv2 import HiLo, Litv2
from vlm.models.backbones.moh import Moh
from vlm.models.backbones.nat import Nat, NeighborhoodAttention
from vlm.models.backbones.overlock import Overlock
from vlm.models.backbones.transnext import Transnext
from vlm.models.backbones.vsa import VariedSizeWindowAttention, Vsa
from vlm.models.contmix import ContMix

PUBLISHED = {
    Biformer: {name: f"biformer_{name}" for name in Biformer.variants},
    Litv2: {name: f"litv2_{name}" for name in Litv2.variants},
    Moh: {name: f"moh_transnext_{name}" for name in Moh.variants},
    # at another size the same weights, only dilations differ
    Nat: {name: name for name in Nat.variants} | {"dinat_large_384": "dinat_large"},
    Overlock: {name: f"overlock_{name}" for name in Overlock.variants},
    Transnext: {name: f"transnext_{name}" for name in Transnext.variants}
    | {"micro_aaaa": "transnext_micro_AAAA", "small_384": "transnext_small", "base_384": "transnext_base"},
    Vsa: {
        "s": "ViTAEv2_VSA_S",
        "wide_s": "ViTAEv2_VSA_widePCM_S",
        "wide_48m": "ViTAEv2_VSA_widePCM_48M",
        "wide_b": "ViTAEv2_VSA_widePCM_B",
    },
}
TOLERANCE = 1e-4  # largest difference, in deviations of what the authors' module returns


@pytest.mark.parametrize(
    ("backbone", "variant"),
    [(kind, variant) for kind in PUBLISHED for variant in kind.variants],
    ids=lambda value: value if isinstance(value, str) else value.__name__.lower(),
)
def test_published_weights_fit(backbone, variant, published, entries):
    with torch.device("meta"):
        network = backbone.whole(variant)
    assert entries(network) == published(PUBLISHED[backbone][variant])


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "variant", "name"),
    [
        (Biformer, "tiny", "biformer_tiny"),
        (Litv2, "s", "litv2_s"),
        (Moh, "small_75", "moh_transnext_small_75"),
        (Nat, "nat_mini", "nat_mini"),
        (Nat, "dinat_tiny", "dinat_tiny"),
        (Nat, "dinat_s_tiny", "dinat_s_tiny"),
        (Overlock, "xt", "overlock_xt"),
        (Transnext, "micro", "transnext_micro"),
        (Vsa, "s", "ViTAEv2_VSA_S"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.lower(),
)
def test_a_network_returns_what_the_authors_does(backbone, variant, name, filled, drawn, official):
    expected = official(name)
    found = filled(backbone.whole(variant))(drawn(0, 1, 3, 224, 224))
    assert (found - expected).abs().max() < TOLERANCE * expected.std()


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "name", "seed", "shape"),
    [
        (NeighborhoodAttention(64, 2), "na2d_d64_h2_k7_13x17", 1, (2, 13, 17, 64)),
        (NeighborhoodAttention(64, 2, dilation=2), "na2d_d64_h2_k7_dil2_14x16", 2, (1, 14, 16, 64)),
        (VariedSizeWindowAttention(96, 96, 3), "vsa_d96_h3_w7_28x28", 1, (2, 96, 28, 28)),
        (VariedSizeWindowAttention(96, 96, 3), "vsa_d96_h3_w7_20x25", 2, (1, 96, 20, 25)),
    ],
    ids=["na", "dilated na", "vsa", "vsa with filling"],
)
def test_a_block_returns_what_the_authors_does(module, name, seed, shape, filled, drawn, official):
    expected = official(name)
    assert (filled(module)(drawn(seed, *shape)) - expected).abs().max() < TOLERANCE * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_hilo_returns_what_the_authors_does(share, filled, drawn, official):
    expected = official(f"hilo_d96_h12_ws2_a0{share * 10:.0f}_14x14")
    found = filled(HiLo(96, 12, 2, share))(drawn(1, 2, 196, 96).unflatten(1, (14, 14)))
    assert (found.flatten(1, 2) - expected).abs().max() < TOLERANCE * expected.std()


@torch.no_grad()
def test_refactored_routing_returns_what_the_authors_does(filled, drawn, official):
    expected = official("bra_nchw_d64_h2_w7_k4")
    found = filled(RefactoredRoutedAttention(64, 2, 4))(drawn(1, 2, 64, 14, 14).permute(0, 2, 3, 1))
    assert (found.permute(0, 3, 1, 2) - expected).abs().max() < TOLERANCE * expected.std()


@torch.no_grad()
def test_the_convolutional_glu_returns_what_the_authors_does(filled, drawn, official):
    expected = official("conv_glu_d48_h192")
    found = filled(ConvGlu(48, 192))(drawn(1, 2, 196, 48), (14, 14))
    assert (found - expected).abs().max() < TOLERANCE * expected.std()


@torch.no_grad()
@pytest.mark.parametrize(("entry", "shortcut"), [("out", True), ("branch", False)])
def test_the_block_with_dynamic_kernels_returns_what_the_authors_does(entry, shortcut, filled, drawn, off):
    """The stand-alone block; the golden has its two places of the layer scale, from the authors' ``models/contmix.py``
    run here (dim 64, 2 heads, kernels 7 and 5, seed 1)."""
    block = filled(ContMix(64, 2, 7, 5, 4, scale=1.0, shortcut=shortcut))
    assert off(block(drawn(1, 1, 64, 14, 14)), "contmix_d64_h2_k7_14x14", entry) < TOLERANCE


def test_published_weights_fit_the_block_with_dynamic_kernels(entries, published):
    assert entries(ContMix(64, 2, 13, scale=1.0)) == published("contmix_block_d64_k13")
