"""Models that a recipe puts together from nested parts, with images in tiles: planned, trained, asked."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm.build import build_encoder, build_model, build_tokenizer, program_of
from vlm.create import check
from vlm.data.batch import collate
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.backbones.fused import Fused
from vlm.models.connectors.resampler import Resampler
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.packing import packing_of
from vlm.plan import plan
from vlm.recipe import RecipeError, load_recipe
from vlm.training.loss import inputs_of

VIT = "use: conv_vit, image: 32, depth: 1, heads: 2"
FUSED = f"model.vision={{use: fused, parts: [{{{VIT}, dim: 8}}, {{{VIT}, dim: 16, class_token: true}}], score_from: 1}}"
TILED = "model.image={tiling: anyres, max_tiles: 4}"  # Scenes of 48 x 48 pixels take four tiles of 32 x 32
SHORT = ("stages.tags.steps=2", "stages.tags.schedule.warmup=1", "stages.sft.steps=2", "run.global_batch=4")


def test_it_trains_and_answers(train, recipe: Path, tmp_path: Path):
    train(FUSED, TILED, "model.connector={use: resampler, queries: 4, heads: 2}", *SHORT)
    loaded = load_recipe(recipe, (FUSED, TILED, "model.connector={use: resampler, queries: 4, heads: 2}"))
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    assert isinstance(model.vision, Fused) and isinstance(model.connector, Resampler)
    assert [part.dim for part in model.vision.parts] == [8, 16] and model.vision.class_token
    image = tmp_path / "seen.png"
    Image.effect_noise((48, 48), 50).convert("RGB").save(image)
    asker = Asker(model, tokenizer, build_encoder(loaded, model, tokenizer), lambda key: Path(key).read_bytes(), 2)
    prompts = [Prompt(str(image), text, 2) for text in ("what ?", "where is it ?")]
    assert set(asker(prompts, lambda count: None)) == set(prompts)
    assert model.visual_counts(asker.inputs(prompts)).tolist() == [20, 20]


def test_a_sample_becomes_one_placeholder_and_five_views(recipe: Path, scenes: Path):
    loaded = load_recipe(recipe, (FUSED, TILED))
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    encode = build_encoder(loaded, model, tokenizer)
    store = Store(load_manifest([str(scenes / "train")]))
    examples = [encode(store.read(number), Draw(number, 0, 0)) for number in range(3)]
    assert all(example.tiles == ((2, 2, 48, 48),) and example.images.shape == (5, 3, 32, 32) for example in examples)
    inputs = inputs_of(collate(examples, 0))
    with torch.no_grad():
        out = model(inputs)
    assert out.layout.visual.sum(1).tolist() == [5 * 16] * 3
    row = out.layout.row[0][out.layout.visual[0]]
    assert row[:16].max() == 3 and sorted(set(row[16:].tolist())) == list(range(4, 12))


def test_a_plan_shows_the_most_tokens(recipe: Path):
    text = plan(load_recipe(recipe, (TILED, "model.vision.image=32", "prune={use: divprune, keep: 10%}")))
    assert "Per image 80 visual tokens before any cut at most: the whole image and as many tiles" in text
    assert "8 x 2" in text
    assert "Per image 36 visual tokens before any cut; " in plan(load_recipe(recipe))


def test_a_budget_of_more_tokens_than_an_image_has_is_refused(recipe: Path):
    assert plan(load_recipe(recipe, ("prune={use: divprune, keep: 36}",)))
    assert plan(load_recipe(recipe, (TILED, "model.vision.image=32", "prune={use: divprune, keep: 81}")))  # it depends
    for keep in ("37", "{after_layer: 37}"):
        with pytest.raises(ModelError, match="keep: expected at most the 36 visual tokens of an image; found 37"):
            plan(load_recipe(recipe, (f"prune={{use: fastv, layer: 1, keep: {keep}}}",)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.parts.1.dpth=2", "model.vision.parts.1.dpth is unknown; did you mean 'depth'?"),
        ("model.vision.parts.0.image=wide", "model.vision.parts.0.image must be a whole number such as 20 or 8k"),
        ("model.vision.parts.0.use=conv_vti", "model.vision.parts.0.use conv_vti is unknown; did you mean 'conv_vit'?"),
        ("model.vision.parts=[]", "model.vision.parts must be a list of methods, found an empty one"),
        (
            "model.vision.parts=[{image: 3}]",
            "must be a list of methods such as {use: ...}, with none that is a mapping without use",
        ),
        ("model.vision.parts=null", "model.vision.use fused needs the option 'parts'"),
        ("model.image.tiling=anyers", "model.image.tiling must be 'none' or 'anyres', found 'anyers'"),
        ("model.image.tiles=3", "model.image.tiles is unknown"),
    ],
)
def test_a_mistake_in_a_nested_part_has_its_place(recipe: Path, override: str, message: str):
    with pytest.raises(RecipeError) as error:
        check(load_recipe(recipe, (FUSED, override)))
    assert message in str(error.value) and str(error.value).startswith(f"override {override.split('={')[0][:12]}")


def test_libraries_have_a_short_form_in_parts_too(recipe: Path):
    parts = "model.vision={use: fused, parts: [{timm: vit_tiny_patch16_224, layer: -2}, {hf: some/dinov2}, conv_vit]}"
    loaded = load_recipe(recipe, (parts,))
    assert loaded.model.vision is not None
    assert [dict(part) for part in loaded.model.vision.options["parts"]] == [
        {"use": "timm", "name": "vit_tiny_patch16_224", "layer": "-2"},
        {"use": "huggingface", "name": "some/dinov2"},
        {"use": "conv_vit"},
    ]
    check(loaded)  # reads every option and makes nothing


def test_an_encoder_within_an_encoder(recipe: Path):
    lane = "model.vision={use: multilane, selectors: 3, encoder: {use: conv_vit, class_token: true}}"
    loaded = load_recipe(recipe, (lane,))
    model = build_model(loaded, build_tokenizer(loaded))
    assert model.visual_grid == (1, 3) and model.vision.encoder.class_token
    short = load_recipe(recipe, ("model.vision={use: multilane, encoder: {timm: vit_tiny_patch16_224}}",))
    assert short.model.vision is not None
    assert short.model.vision.options["encoder"] == {"use": "timm", "name": "vit_tiny_patch16_224"}
    with pytest.raises(RecipeError, match=r"model.vision.encoder.dept is unknown; did you mean 'depth'"):
        check(load_recipe(recipe, (lane, "model.vision.encoder.dept=2")))
    with pytest.raises(RecipeError, match=r"model.vision.encoder must be a method such as .*, found a list"):
        check(load_recipe(recipe, (lane, "model.vision.encoder=[conv_vit]")))


def test_rows_of_tiles_end_with_a_newline_that_trains(train, recipe: Path):
    lines = "model.image={tiling: anyres, max_tiles: 4, newline: true}"
    text = plan(load_recipe(recipe, (lines, "model.vision.image=32")))
    assert (
        "Per image 96 visual tokens before any cut at most: " in text and "a newline after each of their rows" in text
    )
    folder = train(lines, "model.vision.image=32", *SHORT)
    last = sorted((folder / "checkpoints").glob("stage1-*"))[-1]
    weights = torch.load(last, weights_only=True)["state_dict"]
    newline = next(value for name, value in weights.items() if name.endswith("newline"))
    loaded = load_recipe(recipe, (lines, "model.vision.image=32"))
    model = build_model(loaded, build_tokenizer(loaded))
    assert model.newline is not None and not torch.equal(newline, model.newline)
    with pytest.raises(RecipeError, match=r"newlines, which end rows of tiles, and so needs tiling: anyres"):
        load_recipe(recipe, ("model.image={newline: true}",))


@pytest.mark.parametrize("prune", [(), ("prune={use: stride, keep: 30%}",)])
def test_newlines_count_in_packs(recipe: Path, scenes: Path, prune: tuple[str, ...]):
    lines = "model.image={tiling: anyres, max_tiles: 4, newline: true}"
    loaded = load_recipe(recipe, (lines, "model.vision.image=32", "stages.sft.pack={tokens: 256}", *prune))
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    encode = build_encoder(loaded, model, tokenizer)
    packing = packing_of(loaded, loaded.stages[1], model, encode)
    assert packing is not None
    store = Store(load_manifest([str(scenes / "train")]))
    with torch.no_grad(), attach(model, program_of(loaded.comparisons[-1], model.facts) if prune else ()):
        for number in range(3):
            example = encode(store.read(number), Draw(number, 0, 0))
            shown = [(medium.width, medium.height) for medium in store.row(number).media]
            size = packing.measure(store.record(number), shown, Draw(number, 0, 0))
            entered = int(model._enter(inputs_of(collate([example], 0)), None)[1].layouts[0].valid.sum())
            assert size.tokens == entered if not prune else entered <= size.tokens <= entered + 10
            assert size.patches == 5 * 16
