"""Newlines behind rows of tiles: against Transformers' LLaVA-NeXT, and a loop; under cuts; saved, trained, planned."""

from typing import Any

import pytest
import torch
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from vlm.create import create
from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.mlp import Mlp
from vlm.models.connectors.resampler import Resampler
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.program.attach import attach
from vlm.models.program.decode import generate
from vlm.models.saved import load_composed, save_composed
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.tiles import tile_table
from vlm.models.vision_language import Inputs, VisionLanguageModel
from vlm.recipe.schema import Method

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES, "initializer_range": 0.25}
# rows, columns, height and width: a wide picture (padding above and below), a small one, a tall one in three tiles
TILES = torch.tensor([[1, 2, 30, 90], [0, 0, 40, 40], [3, 1, 144, 20]])


def build(connector: Any = None, **options: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = ConvVit(48, dim=16, depth=2, heads=2, class_token=True)
    settings = {"max_tiles": 4, "newline": True, **options}
    return VisionLanguageModel(vision, connector or Mlp(16, 32), build_language(LLAMA, 40), **settings).double().eval()


def tiled(rows: tuple[str, ...] = ("t#t", "tt##tt"), tiles: torch.Tensor = TILES) -> Inputs:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (len(rows), max(map(len, rows))), generator=g)
    valid, owner = torch.zeros_like(tokens, dtype=torch.bool), []
    for b, row in enumerate(rows):
        valid[b, : len(row)] = True
        for t, mark in enumerate(row):
            if mark == "#":
                tokens[b, t] = IMAGE_TOKEN
                owner.append(b)
    views = int((1 + tiles[:, 0] * tiles[:, 1]).sum())
    images = torch.randn(views, 3, 48, 48, generator=g, dtype=torch.float64)
    return Inputs(tokens, valid, images, torch.tensor(owner), (), tiles)


def test_the_sequence_is_that_of_transformers():
    """Its ``pack_image_features`` on the same features, with tiles of the encoder's size."""
    vision = {"model_type": "clip_vision_model", "image_size": 48, "patch_size": 8, **SIZES}
    pinpoints = [[48, 96], [144, 48]]
    config = LlavaNextConfig(
        vision_config=vision, text_config={**LLAMA, "vocab_size": 40}, image_grid_pinpoints=pinpoints
    )
    stock: Any = LlavaNextModel._from_config(config)
    for tiles, size in (([1, 2, 300, 900], [300, 900]), ([3, 1, 1440, 400], [1440, 400])):
        views = 1 + tiles[0] * tiles[1]
        features, newline = torch.randn(views, 36, 8), torch.randn(8)
        packed = stock.pack_image_features([features], torch.tensor([size]), "default", newline)
        expected = packed[0][0]
        table = tile_table(torch.tensor([tiles]), (6, 6), True, views, True)
        mine = table.join(features, torch.tensor([0]), newline=newline)
        assert torch.equal(mine.features[0], expected) and table.size.tolist() == [len(expected)]
        assert torch.equal(mine.number[0], torch.arange(len(expected)))


def test_places_and_positions():
    model, inputs = build(), tiled()
    with torch.no_grad():
        embeds, run = model._enter(inputs, None)
    layout = run.layouts[0]
    assert model.newline is not None and model.most_visual_tokens == 5 * 36 + 4 * 6
    for image, (rows, cols, _, _) in enumerate(TILES.tolist()):
        mine = layout.image == image
        line = (embeds[mine] == model.newline).all(1)
        places = list(zip(layout.row[mine].tolist(), layout.col[mine].tolist(), strict=True))
        assert places == sorted(places) and len(set(places)) == len(places)
        assert not line[:36].any() and (rows > 0) == bool(line.any())
        below = sorted({row for row, _ in places[36:]})
        last = {row: max(col for r, col in places[36:] if r == row) for row in below}
        ends = [place for place, end in zip(places, line.tolist(), strict=True) if end]
        assert ends == [(row, last[row]) for row in below]
        assert all(col <= cols * 6 for col in last.values())
    assert model.visual_counts(inputs).tolist() == layout.visual.sum(1).tolist() == run.total.tolist()
    for row in range(2):
        assert layout.position[row][layout.valid[row]].tolist() == list(range(int(layout.valid[row].sum())))


def test_what_is_no_patch_has_no_features():
    model, inputs = build(), tiled()
    features, patch = model.patch_features(inputs)
    share = model.picture_share(inputs)
    with torch.no_grad():
        embeds, run = model._enter(inputs, None)
    for row in range(2):
        visual = embeds[row][run.layouts[0].visual[row]]
        line = (visual == model.newline).all(1)
        assert torch.equal(patch[row, : len(line)], ~line) and not patch[row, len(line) :].any()
        torch.testing.assert_close(model.connector.layers(features[row, : len(line)])[~line], visual[~line])
        assert not share[row, : len(line)][line].any()


PRUNERS: dict[str, dict[str, Any]] = {
    "visionzip": {"use": "visionzip", "keep": "30%"},
    "stride": {"use": "stride", "keep": "30%"},
    "divprune": {"use": "divprune", "keep": "30%"},
    "fastv": {"use": "fastv", "layer": 1, "keep": "30%"},
    "tome": {"use": "tome", "keep": "50%"},
}


@pytest.mark.parametrize("name", PRUNERS)
def test_a_newline_stays_with_its_row(name):
    model, inputs = build(), tiled()
    pruner = create("prune", Method(**PRUNERS[name]))
    program = pruner.program(model.facts)  # type: ignore[attr-defined]
    with torch.no_grad():
        whole, plain = model._enter(inputs, None)
        before = plain.layouts[0]
        with attach(model, program):
            embeds, run = model._enter(inputs, None)
            layout = run.layouts[0]
            out = model.prefill(inputs)[1].run.last
    in_encoder = any(site.name.startswith("vit.") for site, _ in program)
    line = (embeds == model.newline).all(2) & layout.visual
    for image in range(3):
        mine = layout.image == image
        if not in_encoder:
            continue
        rows = set(layout.row[mine & ~line].tolist())
        below = {row for row in rows if row >= 6}
        assert set(layout.row[mine & line].tolist()) == below
        patches = int((before.image == image).sum()) - int(
            ((whole == model.newline).all(2) & (before.image == image)).sum()
        )
        kept = int((mine & ~line).sum())
        assert abs(kept - pruner.keep.of(patches)) <= 1  # type: ignore[attr-defined]
    if not in_encoder:  # newlines are tokens like others
        for row, total in enumerate(plain.total.tolist()):
            images = 1 + row
            assert abs(int(out.visual[row].sum()) - 0.3 * total) <= images
    assert generate(model, inputs, stop=0, max_new_tokens=2)


def test_it_trains_with_the_connector_in_every_batch():
    model = build().train()
    connector = dict(model.parts["connector"].named_parameters())
    assert any(parameter is model.newline for parameter in connector.values())
    language = dict(model.parts["language"].named_parameters())
    assert not any(parameter is model.newline for parameter in language.values())
    assert model.newline is not None
    inputs = tiled()
    weights = (inputs.valid & (inputs.tokens >= 0)).double()
    model(inputs, weights).loss.backward()
    assert model.newline.grad is not None and model.newline.grad.abs().max() > 0
    for other in (tiled(("t#t",), TILES[1:2]), inputs.without_images()):  # no row of tiles at all
        model.newline.grad = None
        model(other, torch.ones(other.tokens.shape)).loss.backward()
        assert model.newline.grad is not None and model.newline.grad.abs().max() == 0


def test_it_is_saved_and_loaded(tmp_path):
    model, inputs = build(), tiled()
    save_composed(model, tmp_path)
    found = load_composed(tmp_path).model
    assert found.newline is not None and torch.equal(found.newline, model.newline)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(found(inputs).hidden, model(inputs).hidden)
    save_composed(build(newline=False), tmp_path / "without")
    assert load_composed(tmp_path / "without").model.newline is None


def test_what_has_no_rows_of_tiles():
    with pytest.raises(ModelError, match=r"model.image.newline: expected tiles of patches, .*; found no tiles"):
        build(max_tiles=0)
    with pytest.raises(ModelError, match=r"found places that do not say what they show"):
        build(Resampler(16, 32, 4, heads=2))
