"""A recipe whose pictures keep their shape: planned, trained, packed, asked; and what it refuses."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm.build import build_collate, build_encoder, build_model, build_tokenizer
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.data.write import write_shards
from vlm.evaluation.answer import Asker, Prompt
from vlm.packing import packing_of
from vlm.plan import plan
from vlm.recipe import RecipeError, load_recipe
from vlm.training.loss import inputs_of

VISION = (
    "model.vision={use: naflex, max_patches: 12, config: {model_type: siglip2_vision_model, hidden_size: 16, "
    "intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, num_patches: 16}}"
)
STAGES = (
    "stages=[{sft: {mix: {scenes: 1}, train: {vision: {lr: 1e-2}, connector: {lr: 1e-2}, language: {lr: 1e-2}}, "
    "schedule: {warmup: 1}, steps: 2%s}}]"
)
SHAPES = ((48, 48), (80, 30), (20, 60))  # width and height


@pytest.fixture(scope="module")
def shards(scenes: Path, tmp_path_factory) -> str:
    """Samples of Scenes whose pictures were given three shapes."""
    store, samples = Store(load_manifest([str(scenes / "train")])), []
    for number in range(24):
        sample = store.read(number)
        out = io.BytesIO()
        Image.open(io.BytesIO(sample.media[0])).resize(SHAPES[number % 3]).save(out, "PNG")
        samples.append(replace(sample, media=(out.getvalue(),), media_ext=("png",), media_info=()))
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(samples, folder)
    return f"data.sources.scenes.shards={folder}"


def test_it_is_planned_and_trains(recipe: Path, shards: str, train, tmp_path: Path):
    common = (VISION, shards, "run.global_batch=6", STAGES % "")
    text = plan(load_recipe(recipe, (*common, "prune={use: divprune, keep: 50%}")))
    assert "Per image 1 to 12 visual tokens before any cut, by its shape; the table is of one with 12" in text
    assert "6 x 2" in text
    folder = train(*common)
    loaded = load_recipe(recipe, common)
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    assert list((folder / "checkpoints").iterdir())
    encode = build_encoder(loaded, model, tokenizer)
    names = []
    for number, size in enumerate(SHAPES):
        names.append(str(tmp_path / f"{number}.png"))
        Image.effect_noise(size, 50).convert("RGB").save(names[-1])
    asker = Asker(model, tokenizer, encode, lambda key: Path(key).read_bytes(), 4)
    prompts = [Prompt(name, "what ?", 2) for name in names]
    assert set(asker(prompts, lambda count: None)) == set(prompts)
    inputs = asker.inputs(prompts)
    with torch.no_grad():
        grids = model._enter(inputs, "left")[1].grids
    assert len(set(grids)) == 3 and grids[0] == (3, 3)
    assert model.visual_counts(inputs).tolist() == [rows * columns for rows, columns in grids]


def test_packs_are_measured_by_each_pictures_shape(recipe: Path, shards: str, train):
    common = (VISION, shards, "run.global_batch=2", STAGES % ", pack: {tokens: 96}")
    loaded = load_recipe(recipe, common)
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    encoder = build_encoder(loaded, model, tokenizer)
    packing = packing_of(loaded, loaded.stages[0], model, encoder)
    assert packing is not None
    store = Store(load_manifest(list(loaded.data.sources["scenes"].shards)))
    collate, seen = build_collate(encoder, tokenizer), set()
    for number in range(3):
        draw = Draw(number, 0, 3)
        example = encoder(store.read(number), draw)
        shown = [(medium.width, medium.height) for medium in store.row(number).media]
        size = packing.measure(store.record(number), shown, Draw(number, 0, 3))
        count = int(model.visual_counts(inputs_of(collate([example])))[0])
        assert size.tokens == len(example.tokens) - 1 + count and size.patches == count
        seen.add(count)
    assert len(seen) > 1
    assert list((train(*common) / "checkpoints").iterdir())


def test_an_objective_of_the_encoder_alone_is_refused(recipe: Path, shards: str):
    with pytest.raises(RecipeError, match=r"objective tags trains the encoder on pictures of one size; .* naflex"):
        plan(load_recipe(recipe, (VISION, shards)))
