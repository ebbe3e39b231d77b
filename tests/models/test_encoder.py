"""Encoders against timm itself, and the connector's fold against a loop."""

from typing import Any

import pytest
import timm
import torch

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.timm import Timm
from vlm.models.connectors.mlp import Mlp
from vlm.models.errors import ModelError
from vlm.models.language import build_language, load_language, load_tokenizer

TINY = "vit_tiny_patch16_224"


@pytest.mark.parametrize("layer", [-1, -2, 0, 5, 11, -12])
def test_features_are_those_of_timm(layer):
    encoder = Timm(TINY, layer=layer).eval()
    full: Any = timm.create_model(TINY, num_classes=0).eval()
    missing, _ = full.load_state_dict(encoder.model.state_dict(), strict=False)
    full_norm = layer in (-1, 11)
    assert all(name.startswith(("blocks.", "norm.", "fc_norm.")) for name in missing)
    assert full_norm or all(not name.startswith(f"blocks.{layer % 12}.") for name in missing)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        mine = encoder(images)
        (found,) = full.forward_intermediates(
            images,
            indices=[layer],
            norm=full_norm,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )
    assert torch.equal(mine.tokens, found[0]) and mine.prefix is not None and torch.equal(mine.prefix, found[1])
    assert (encoder.dim, encoder.grid, mine.grid) == (192, (14, 14), (14, 14))
    assert len(encoder.model.blocks) == layer % 12 + 1  # what comes after is not computed


def test_the_last_layer_is_the_whole_model():
    encoder = Timm(TINY).eval()
    full: Any = timm.create_model(TINY, num_classes=0).eval()
    full.load_state_dict(encoder.model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(encoder(images).tokens, full.forward_features(images)[:, 1:])


def test_a_convolutional_model_gives_its_map_in_raster_order():
    encoder = Timm("resnet10t", layer=-1, image=96).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        mine = encoder(images)
        model: Any = encoder.model
        (found,) = model.forward_intermediates(images, indices=[-1], intermediates_only=True)
    assert encoder.grid == (3, 3) and mine.prefix is None
    for place in range(9):
        assert torch.equal(mine.tokens[0, place], found[0, :, place // 3, place % 3])


def test_building_leaves_the_statistics_of_batch_norm():
    encoder = Timm("resnet10t", image=64)
    means = [buffer for name, buffer in encoder.named_buffers() if name.endswith("running_mean")]
    assert means and all(not mean.any() for mean in means)
    assert encoder.training


def test_another_image_size():
    assert Timm(TINY, image=96).grid == (6, 6)
    assert Timm(TINY, image=96).image.size == 96
    assert Timm(TINY).image.mean == (0.5, 0.5, 0.5)


def test_conv_vit_has_a_token_for_8_by_8_pixels():
    encoder = ConvVit(48, dim=16, depth=2, heads=2)
    assert (encoder.grid, encoder.dim) == ((6, 6), 16)
    images = torch.randn(2, 3, 48, 48)
    encoder(images).tokens.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    moved = encoder.model.patch_embed(images.roll(8, 3)).unflatten(1, (6, 6))
    still = encoder.model.patch_embed(images).unflatten(1, (6, 6))
    torch.testing.assert_close(moved[:, 1:-1, 2:-1], still[:, 1:-1, 1:-2])  # raster order: columns move along a row


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("vit_tiny_patch16_244", "vit_tiny_patch16_224"),
        ("vit_so400m_patch14_siglip_348", "vit_so400m_patch14_siglip_384"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, similar):
    with pytest.raises(ModelError, match=f"timm has no model '{name}'; similar: .*{similar}"):
        Timm(name)


def test_a_name_unlike_any_other():
    with pytest.raises(ModelError, match="similar: none"):
        Timm("§§§§")


@pytest.mark.parametrize("layer", [12, -13, 99])
def test_a_layer_that_does_not_exist(layer):
    with pytest.raises(
        ModelError, match=rf"model.vision: VisionTransformer has feature layers -12..11; found layer {layer}"
    ):
        Timm(TINY, layer=layer)


@pytest.mark.parametrize(("rows", "cols", "fold"), [(4, 6, 2), (3, 3, 3), (6, 4, 2), (2, 2, 1)])
def test_shuffle_folds_squares(rows, cols, fold):
    connector = Mlp(5, 7, depth=1, shuffle=fold)
    x = torch.randn(2, rows * cols, 5)
    out = connector(x, (rows, cols))
    grid = connector.grid(rows, cols)
    assert grid == (rows // fold, cols // fold) and out.shape == (2, grid[0] * grid[1], 7)
    for r in range(grid[0]):
        for c in range(grid[1]):
            square = [x[:, (r * fold + i) * cols + c * fold + j] for i in range(fold) for j in range(fold)]
            expected = connector.layers[0](torch.cat(square, 1))
            torch.testing.assert_close(out[:, r * grid[1] + c], expected, rtol=1e-5, atol=1e-6)


def test_depth_is_the_number_of_linear_layers():
    for depth in (1, 2, 3):
        assert sum(isinstance(m, torch.nn.Linear) for m in Mlp(4, 6, depth=depth).layers) == depth


def test_a_fold_that_does_not_divide_and_settings_out_of_range():
    with pytest.raises(ModelError, match="shuffle 4 does not divide the grid 6 x 6"):
        Mlp(4, 6, shuffle=4).grid(6, 6)
    with pytest.raises(ModelError, match="at least 1; found 0 and 1"):
        Mlp(4, 6, depth=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 32}, "model_type is missing"),
        ({"model_type": "lama"}, "cannot build 'lama'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot build 'llama': .*'hidden_size' expected int, got str"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}, "cannot build 'llama': .*33.* multiple"),
    ],
)
def test_a_language_config_that_cannot_be_built(config, message):
    with pytest.raises(ModelError, match=f"^model.language.config: {message}") as error:
        build_language(config, 40)
    assert "\n" not in str(error.value)


def test_a_language_model_that_is_not_there(tmp_path):
    for load in (load_language, load_tokenizer):
        with pytest.raises(ModelError, match=r"^model.language") as error:
            load(str(tmp_path / "nothing"))
        assert "\n" not in str(error.value)
