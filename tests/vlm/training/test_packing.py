"""Training on packs: the same run however it is split and wherever it was killed; what cannot be packed is refused."""

import json

import pytest
import torch

from vlm.build import build_encoder, build_model, build_tokenizer
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.pruners.divprune import Divprune
from vlm.packing import VisualTokens, packing_of
from vlm.plan import plan
from vlm.recipe import RecipeError, load_recipe
from vlm.run import run
from vlm.training.work import stage_steps

PACKED = {"stages.1.pack.tokens": "220", "stages.1.pack.buffer": "6", "run.global_batch": "4", "run.threads": "1"}


def load(path, **more):
    given = PACKED | {name.replace("__", "."): str(value) for name, value in more.items()}
    return load_recipe(path, [f"{name}={value}" for name, value in given.items()])


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    newest = sorted((folder / "checkpoints").glob("stage1-*.ckpt"))[-1]
    return torch.load(newest, weights_only=True)["state_dict"]


@pytest.fixture
def parts(recipe):
    loaded = load(recipe)
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer)
    return loaded, model, build_encoder(loaded, model, tokenizer, 0.25)


def test_sizes_are_those_of_the_examples(parts):
    loaded, model, encoder = parts
    packing = packing_of(loaded, loaded.stages[1], model, encoder)
    store = Store(load_manifest(list(loaded.data.sources["scenes"].shards)))
    seen = set()
    for number in range(24):
        example = encoder(store.read(number), Draw(number, 0, 3))
        shown = [(medium.width, medium.height) for medium in store.row(number).media]
        size = packing.measure(store.record(number), shown, Draw(number, 0, 3))
        images = len(example.images)
        seen.add(images)
        assert size.length == len(example.tokens)
        assert size.tokens == len(example.tokens) + images * (model.visual_tokens - 1)
        assert size.patches == images * model.vision.grid[0] * model.vision.grid[1]
    assert seen == {0, 1}  # images are dropped by the same draw


def test_a_run_is_the_same_in_one_piece_and_in_two_with_other_micro_batches(recipe, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(load(recipe, run__dir=whole))
    run(load(recipe, run__dir=halves, run__micro_batch=1, stages__1__steps=10))
    for path in (halves / "checkpoints").glob("stage1-*"):
        if "step00000004" not in path.name:
            path.unlink()
    run(load(recipe, run__dir=halves, run__micro_batch=2))
    assert lines(halves, "samples.jsonl") == lines(whole, "samples.jsonl")
    packed = [line["ids"] for line in lines(whole, "samples.jsonl") if line["stage"] == 1]
    assert len(packed) == 10 and all(len(ids) > 2 * 4 for ids in packed)
    first = [key for ids in packed[:3] for key in ids]
    assert len(set(first)) == len(first)
    expected, found = weights(whole), weights(halves)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)
    assert all(line["loss"] > 0 for line in lines(whole, "metrics.jsonl"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_on_the_packs_of_one(parallel, recipe, ranks, tmp_path):
    """Half of it by two processes and half by one: each pack goes to one rank, whole, and the run is that of one."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run(load(recipe, run__dir=whole))
    given = [f"{name}={value}" for name, value in PACKED.items()]
    group = ranks(2, *given, f"run.parallel={parallel}", "run.micro_batch=1", to="shared")
    assert group.join() == [0, 0], group.output()
    samples = lines(whole, "samples.jsonl")
    assert lines(shared, "samples.jsonl") == samples
    for path in (shared / "checkpoints").glob("stage1-*"):
        if "step00000004" not in path.name:
            path.unlink()
    run(load(recipe, run__dir=shared))
    assert lines(shared, "samples.jsonl") == samples
    expected, found = weights(whole), weights(shared)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)


def test_the_plan_tells_how_full_packs_are(recipe):
    text = plan(load(recipe))
    [line] = [line for line in text.splitlines() if "% full" in line]
    assert line.startswith("Stage sft: packs of 220 tokens, ")
    assert "4 packs per step" in text and "8 samples per step" not in text
    assert float(line.split("tokens, ")[1].split("%")[0]) > 80


def test_a_length_in_samples_or_tokens_counts_what_packs_hold(parts, recipe):
    loaded, model, encoder = parts
    packing = packing_of(loaded, loaded.stages[1], model, encoder)
    stores = [Store(load_manifest(list(loaded.data.sources["scenes"].shards)))]
    stage = loaded.stages[1].model_copy(update={"steps": None, "samples": 200})
    steps = stage_steps(stage, 4, stores, encoder, packing, 4)
    assert 200 / (4 * 9) < steps < 200 / (4 * 2)
    stage = loaded.stages[1].model_copy(update={"steps": None, "tokens": 220 * 40})
    assert 10 <= stage_steps(stage, 4, stores, encoder, packing, 4) <= 13


def test_pruning_makes_room(recipe):
    full, pruned = (
        float(next(line for line in plan(r).splitlines() if "% full" in line).split("about ")[1].split()[0])
        for r in (load(recipe), load(recipe, prune__use="divprune", prune__keep="25%"))
    )
    assert pruned > 1.5 * full


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"prune__use": "fastv", "prune__keep": "50%", "prune__layer": 1},
            "stage sft: pack: fastv acts inside the language model",
        ),
        ({"stages__0__pack__tokens": 100}, "stage tags: pack: objective tags reads one sample per row"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_the_plan(recipe, more, expected):
    with pytest.raises((RecipeError, ModelError), match=expected):
        plan(load(recipe, **more))


def test_room_for_visual_tokens_by_hand(parts):
    _, model, _ = parts
    assert VisualTokens((), 2)(36, 1) == 36
    half = Divprune(Budget.parse("50%")).program(model.facts)
    assert VisualTokens(half, 2)(36) == 18
    assert VisualTokens(half, 2)(35 * 3, 3) == 3 * 18 + 3  # and one each for rounding
    assert VisualTokens(half, 2, start=1.0)(36) == 36  # a keep schedule begins with all
    assert VisualTokens(Divprune(Budget.parse("10")).program(model.facts), 2)(72, 2) == 22
    assert VisualTokens(half, 2)(0, 0) == 0


def test_a_round_of_repeats(recipe, tmp_path):
    more = {"stages__1__mix": "null", "stages__1__steps": "null", "stages__1__repeat__scenes": 1}
    text = plan(load(recipe, **more))
    assert "one round of its repeats" in text
    with pytest.raises(RecipeError, match="stands beside mix"):
        load(recipe, stages__1__repeat__scenes=2)
