"""Pictures that keep their shape (SigLIP 2 NaFlex): against Transformers, and each alone against among others."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

from vlm.create import create
from vlm.data.batch import Example, collate
from vlm.data.errors import DataError
from vlm.data.images import ImageTransform, joined, patch_grid
from vlm.models.backbones.naflex import Naflex
from vlm.models.connectors.mlp import Mlp
from vlm.models.connectors.resampler import Resampler
from vlm.models.encoder import unread
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.program.attach import attach
from vlm.models.program.decode import generate
from vlm.models.saved import load_composed, save_composed
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel
from vlm.recipe.schema import Method

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = {"model_type": "siglip2_vision_model", **SIZES, "patch_size": 4, "num_patches": 16}
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES, "initializer_range": 0.25}
PATCHES = 30
SHAPES = ((40, 90), (64, 64), (200, 31))  # height and width of a wide picture, a square, a tall one


def picture(number: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8))


PICTURES = [picture(number, *shape) for number, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("naflex")
    torch.manual_seed(0)
    Siglip2VisionModel(Siglip2VisionConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).save_pretrained(
        found
    )
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=PATCHES).save_pretrained(found)
    return found


def transform(encoder: Any) -> ImageTransform:
    size, mean, std, interpolation = encoder.image
    return ImageTransform((size, size), mean, std, "stretch", interpolation, 0, encoder.patch, encoder.max_patches)


def seen(encoder: Any, pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and table of tiles of a batch, as data gives them."""
    views = [transform(encoder).views(one) for one in pictures]
    return joined([view.pixels for view in views]), torch.tensor([view.tiles for view in views])


@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
def test_features_are_those_of_transformers_and_its_processor(folder, layer):
    encoder, stock = Naflex(str(folder), layer, PATCHES).eval(), Siglip2VisionModel.from_pretrained(folder).eval()
    batch = Siglip2ImageProcessorPil.from_pretrained(folder)(PICTURES, return_tensors="pt")
    pixels, tiles = seen(encoder, PICTURES)
    with torch.no_grad():
        out = stock(**batch, output_hidden_states=True)
        mine = encoder(pixels, tiles[:, 2:]).tokens
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer + 1 if layer >= 0 else layer]
    assert torch.equal(encoder.grids(tiles[:, 2:]), batch["spatial_shapes"])
    assert len({tuple(grid) for grid in batch["spatial_shapes"].tolist()}) == 3  # the test has three shapes
    for number, (rows, cols) in enumerate(batch["spatial_shapes"].tolist()):
        torch.testing.assert_close(mine[number, : rows * cols], expected[number, : rows * cols], rtol=0, atol=2e-6)


def test_the_processor_on_tensors_rounds_alike(folder):
    """Transformers' other processor resizes with torchvision: at most two of 255 levels between the two."""
    encoder = Naflex(str(folder), -1, PATCHES)
    batch = Siglip2ImageProcessor(patch_size=4, max_num_patches=PATCHES)(PICTURES, return_tensors="pt")
    pixels, tiles = seen(encoder, PICTURES)
    mine, there = encoder.patches(pixels, encoder.grids(tiles[:, 2:]))
    assert torch.equal(there, batch["pixel_attention_mask"].bool()[:, : there.shape[1]])
    assert (mine - batch["pixel_values"][:, : there.shape[1]]).abs().max() <= 2 / 127.5 + 1e-6


def test_the_vision_side_of_a_model_with_two(tmp_path):
    vision = {k: v for k, v in CONFIG.items() if k != "model_type"}
    both = Siglip2Model(Siglip2Config(vision_config=vision, text_config={**SIZES, "vocab_size": 20, "eos_token_id": 2}))
    both.eval().save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=4).save_pretrained(tmp_path)
    encoder = Naflex(str(tmp_path), -1, 16).eval()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        values, mask = encoder.patches(images, torch.tensor([[4, 4]]))
        expected = both.vision_model(values, mask, torch.tensor([[4, 4]])).last_hidden_state
        torch.testing.assert_close(encoder(images).tokens, expected, rtol=0, atol=1e-6)
    assert encoder(images).grid == (4, 4)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([14, 16]), st.sampled_from([1, 49, 256, 1024]))
def test_the_grid_is_the_official_one(height, width, patch, most):
    expected = get_image_size_for_max_num_patches(height, width, patch, most)
    rows, columns = patch_grid(height, width, patch, most)
    assert (rows * patch, columns * patch) == expected and rows * columns <= most


def build(**connector: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = Naflex(layer=-2, max_patches=PATCHES, config=dict(CONFIG))
    for parameter in vision.parameters():  # enough for attention to differ from place to place
        parameter.data += 0.2 * torch.randn_like(parameter)
    return VisionLanguageModel(vision, Mlp(32, 32, **connector), build_language(LLAMA, 40)).double().eval()


def inputs_for(model: VisionLanguageModel, rows: tuple[str, ...], chosen: list[int], seed: int = 1) -> Inputs:
    """Rows of text (t) and images (#), which are ``chosen`` of PICTURES; text is by place, so a row is itself alone."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    valid, owner = torch.zeros_like(tokens, dtype=torch.bool), []
    for b, row in enumerate(rows):
        valid[b, : len(row)] = True
        for t, mark in enumerate(row):
            tokens[b, t] = IMAGE_TOKEN if mark == "#" else 3 + 5 * t
            owner += [b] * (mark == "#")
    pixels, tiles = seen(model.vision, [PICTURES[number] for number in chosen])
    return Inputs(tokens, valid, pixels.double(), torch.tensor(owner), (), tiles)


def test_layout_and_embeddings_are_each_pictures_own():
    model = build()
    inputs = inputs_for(model, ("t#tt", "t##tt"), [0, 1, 2])
    grids = [patch_grid(*shape, 4, PATCHES) for shape in SHAPES]
    with torch.no_grad():
        embeds, run = model._enter(inputs, None)
    layout = run.layouts[0]
    assert model.visual_counts(inputs).tolist() == [
        grids[0][0] * grids[0][1],
        sum(rows * cols for rows, cols in grids[1:]),
    ]
    assert run.grids == grids
    assert model.visual_tokens is None and model.facts.visual is None and model.most_visual_tokens == PATCHES
    stock: Any = model.vision.model
    for image, (rows, cols) in enumerate(grids):
        mine = layout.image == image
        places = torch.stack([layout.row[mine], layout.col[mine]], 1)
        assert torch.equal(places, torch.cartesian_prod(torch.arange(rows), torch.arange(cols)))
        pixels = inputs.images[image : image + 1, :, : rows * 4, : cols * 4]
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(1, rows * cols, 48)
        mask = torch.ones(1, rows * cols)
        with torch.no_grad():
            hidden = stock(patches, mask, torch.tensor([[rows, cols]]), output_hidden_states=True).hidden_states[-2]
            torch.testing.assert_close(embeds[mine], model.connector.layers(hidden)[0], rtol=0, atol=1e-9)
    for row, length in enumerate((4 - 1, 5 - 2)):
        assert layout.position[row][layout.valid[row]].tolist() == list(
            range(length + int(model.visual_counts(inputs)[row]))
        )
    frame = model.overview(layout, 1)
    assert frame is not None and (frame.image, frame.rows, frame.cols) == (1, *grids[1])


PRUNERS: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"use": "fastv", "layer": 2, "keep": "40%"},
    "divprune": {"use": "divprune", "keep": "40%"},
    "tome": {"use": "tome", "keep": "40%"},
    "random": {"use": "random", "keep": 7},
    "flowcut": {"use": "flowcut", "keep": "40%"},
    "visionzip": {"use": "visionzip", "keep": "40%", "attention": "received"},
    "vispruner": {"use": "vispruner", "keep": 8, "attention": "received"},
    "prumerge": {"use": "prumerge", "attention": "received"},
    "holov": {"use": "holov", "keep": "40%", "attention": "received"},
    "vscan": {"use": "vscan", "keep": "40%", "attention": "received"},
    "pool": {"use": "pool", "keep": "25%"},
    "stride": {"use": "stride", "keep": "40%"},
}


def attached(model: VisionLanguageModel, options: dict[str, Any]) -> Any:
    if not options:
        return attach(model, ())
    return attach(model, create("prune", Method(**options)).program(model.facts))


@pytest.mark.parametrize("name", PRUNERS)
def test_a_picture_alone_is_what_it_is_among_others(name):
    model = build()
    rows = ("t#tt", "ttt#t", "t#")
    with torch.no_grad(), attached(model, PRUNERS[name]):
        together, stream = model.prefill(inputs_for(model, rows, [0, 1, 2]))
        last = stream.run.last
        for row in range(3):
            alone, single = model.prefill(inputs_for(model, (rows[row],), [row]))
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-8)
            mine = [getattr(last, field)[row][last.valid[row]] for field in ("row", "col", "position")]
            own = [getattr(single.run.last, f)[0][single.run.last.valid[0]] for f in ("row", "col", "position")]
            assert all(torch.equal(a, b) for a, b in zip(mine, own, strict=True))


def test_a_cut_in_the_encoder_under_gradient_checkpointing():
    """Blocks that run again in the backward pass find their cuts and the padding of their own pass."""
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.vision.model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = inputs_for(model, ("t#tt", "ttt#t"), [0, 2])
        with attached(model, PRUNERS["tome"]):
            model(inputs, (inputs.valid & (inputs.tokens > 0)).double()).loss.backward()
        gradients.append(model.vision.model.embeddings.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert gradients[0].abs().max() > 0


def test_pixels_are_changed_picture_by_picture():
    model = build()
    inputs = inputs_for(model, ("t#t", "t##t"), [0, 1, 2])
    shapes: list[tuple[int, ...]] = []

    def darker(pixels: torch.Tensor, number: int) -> torch.Tensor:
        shapes.append(tuple(pixels.shape[1:]))
        return pixels - 1 - number

    assert inputs.tiles is not None
    changed = model.map_pixels(inputs, darker)
    assert shapes == [tuple(size) for size in inputs.tiles[:, 2:].tolist()]
    for number, (height, width) in enumerate(shapes):
        mine, was = changed.images[number], inputs.images[number]
        assert torch.equal(mine[:, :height, :width], was[:, :height, :width] - 1 - number)
        assert not mine[:, height:].any() and not mine[:, :, width:].any()


def test_it_is_saved_and_loaded(tmp_path):
    model = build().float()
    inputs = inputs_for(model, ("t#t", "t##t"), [0, 1, 2])
    inputs = inputs._replace(images=inputs.images.float())
    save_composed(model, tmp_path)
    found = load_composed(tmp_path).model
    assert (found.max_patches, found.vision.patch, found.vision.image) == (PATCHES, 4, model.vision.image)
    with torch.no_grad():
        assert torch.equal(found(inputs).hidden, model(inputs).hidden)
    assert generate(found, inputs, stop=0, max_new_tokens=3) == generate(model, inputs, stop=0, max_new_tokens=3)


def test_doubled_and_text_only():
    model = build()
    inputs = inputs_for(model, ("t#t", "t#tt"), [0, 2])
    twice = inputs.doubled()
    assert model.visual_counts(twice).tolist() == [2 * count for count in model.visual_counts(inputs).tolist()]
    with torch.no_grad():
        _, run = model._enter(twice, None)
        assert run.grids[0] == run.grids[1] != run.grids[2] == run.grids[3]
        bare = model(inputs.without_images())
    assert not bare.layout.visual.any()
    without = model.train()(inputs.without_images(), torch.ones(2, 3))  # the vision path runs, times zero
    without.loss.backward()
    assert model.vision.model.embeddings.patch_embedding.weight.grad.abs().max() == 0


def test_what_never_trains_is_known():
    model = build()
    idle = unread(model.vision)
    assert any(name.startswith("model.head.") for name in idle)
    assert {name.split(".")[3] for name in idle if ".layers." in name} == {"3"}
    assert "model.embeddings.position_embedding.weight" not in idle


def test_data_stands_in_one_tensor_with_a_size_each():
    encoder = Naflex(max_patches=PATCHES, config=dict(CONFIG))
    views = [transform(encoder).views(one) for one in PICTURES]
    tiles: list[Any] = [view.tiles for view in views]
    pixels = joined([views[0].pixels, views[1].pixels])
    first = Example("a", [-1, -1], [0.0, 0.0], pixels, (), 0, (tiles[0], tiles[1]))
    second = Example("b", [-1], [0.0], views[2].pixels, (), 1, (tiles[2],))
    batch = collate([first, second], 0)
    assert batch.image_owner.tolist() == [0, 0, 1]
    assert batch.tiles is not None and batch.tiles.tolist() == [list(tile) for tile in tiles]
    for number, view in enumerate(views):
        height, width = view.pixels.shape[2:]
        assert view.tiles == (0, 0, height, width)
        assert torch.equal(batch.images[number, :, :height, :width], view.pixels[0])
    bare = [Example("c", [-1], [0.0], view.pixels) for view in views[:2]]
    with pytest.raises(DataError, match="sample c: image: expected the batch's shape"):
        collate(bare, 0)
    with pytest.raises(DataError, match="expected tiles or pictures that keep their shape, found both"):
        ImageTransform((4, 4), max_tiles=2, max_patches=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "naflex needs either a name or a config"),
        ({"config": CONFIG, "layer": 4}, r"expected a layer in -4..3; found layer 4"),
        ({"config": CONFIG, "max_patches": 0}, "expected max_patches of at least 1; found 0"),
        ({"config": {"model_type": "siglip_vision_model", **SIZES}}, "found siglip_vision_model, for which there is"),
        ({"config": {**CONFIG, "hidden_size": 30}}, "model.vision.config: cannot build 'siglip2_vision_model': "),
        ({"name": "/nowhere"}, "no encoder at '/nowhere'"),
    ],
)
def test_an_encoder_that_cannot_be_made(options, message):
    with pytest.raises(ModelError, match=message) as error:
        Naflex(**options)
    assert "\n" not in str(error.value)


def test_what_does_not_go_together():
    vision, language = Naflex(max_patches=PATCHES, config=dict(CONFIG)), build_language(LLAMA, 40)
    for connector in (Mlp(32, 32, shuffle=2), Resampler(32, 32, 4, heads=2)):
        with pytest.raises(ModelError, match=r"a connector that works token by token .*; found .*, which mixes tokens"):
            VisionLanguageModel(vision, connector, language)
    with pytest.raises(ModelError, match=r"expected image.tiling: none .*; found 4 tiles"):
        VisionLanguageModel(vision, Mlp(32, 32), language, max_tiles=4)
    model = build()
    inputs = inputs_for(model, ("t#t",), [0])
    for tiles, message in (
        ([[0, 0, 16, 27]], "expected pictures of whole patches of 4 pixels, 1 to 30 of them; found 16 x 27 pixels"),
        ([[0, 0, 400, 28]], "found 400 x 28 pixels"),
        ([[1, 2, 16, 28]], "expected 1 pictures in one view each; found tiles"),
    ):
        with pytest.raises(ModelError, match=message):
            model(inputs._replace(tiles=torch.tensor(tiles)))
    with pytest.raises(ModelError, match=r"visionzip: .* no class token; set attention: received"), torch.no_grad():
        attached(model, {"use": "visionzip", "keep": "40%"})
