"""Calibration: a plan tells that it is due, an evaluation makes it, for this model only; what it finds is kept."""

import json
import re

import pytest

from vlm.build import build_model, build_tokenizer, for_evaluation, program_of
from vlm.calibrate import SAMPLES, Samples, calibrate, is_caption
from vlm.commands import main
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.evaluation.answer import Asker
from vlm.models.errors import ModelError
from vlm.models.program.artifact import contents, write
from vlm.plan import plan
from vlm.recipe import RecipeError, load_recipe
from vlm.run import run
from vlm.training.weights import trained_weights

METHOD = "{use: zerotuning, calibration: auto, objective: entropy, layers: [0, 0]}"
ROW = f"evaluate.compare=[{{mitigate: {METHOD}}}]"


def test_ahead_by_the_command(train, recipe, capsys):
    folder = train()
    words = [f"run.dir={folder}", ROW]
    loaded = load_recipe(recipe, words)
    assert "Found on the data before the evaluation, or ahead by `vlm calibrate`: zerotuning." in plan(loaded)
    assert main(["calibrate", str(recipe), "--samples", "6", *words]) == 0
    (path,) = (folder / "calibration").glob("zerotuning-*.safetensors")
    assert str(path) in capsys.readouterr().out
    assert "Found on" not in plan(loaded)
    other = load_recipe(recipe, [words[0], ROW.replace("[0, 0]", "[1, 1]")])
    assert "vlm calibrate`: zerotuning." in plan(other)
    assert calibrate(loaded, samples=6) == [path]


def test_an_evaluation_makes_what_is_missing_and_what_is_of_other_weights(train, recipe, capsys):
    folder = train()
    loaded = load_recipe(recipe, [ROW, f"run.dir={folder}"])
    calibrated = "calibrate zerotuning  2/2 (100 %)"
    run(loaded, ("evaluate",))
    assert calibrated in capsys.readouterr().err and (folder / "evaluation.json").is_file()
    (path,) = (folder / "calibration").iterdir()
    found = contents(path, "x")
    run(loaded, ("evaluate",))
    assert calibrated not in capsys.readouterr().err
    write(path, found.tensors, {**found.about, "weights": "those of before"})
    run(loaded, ("evaluate",))
    assert calibrated in capsys.readouterr().err
    assert contents(path, "x").about["weights"] == found.about["weights"]


def test_a_file_that_is_given_must_be_there(recipe):
    loaded = load_recipe(recipe, [ROW.replace("auto", "nowhere.safetensors")])
    with pytest.raises(ModelError, match=r"zerotuning.calibration: .* at nowhere\.safetensors; found no file; run"):
        plan(loaded)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (METHOD, "zerotuning.calibration: auto is found after training, so the method cannot act in it; give it to"),
        (
            "{use: pai, layers: [0, 1]}",
            "this method acts at attn[0] on a text that grows, which training",
        ),
        ("vhr", "this method acts at heads[1] on a text"),
        ("vista_vsv", "this method acts at resid[0] on a text"),
        ("pause", "this method acts at prompt on a text"),
    ],
)
def test_training_with_what_is_for_answers_is_refused_before_it(recipe, method, why):
    loaded = load_recipe(recipe, [f"mitigate={method}"])
    for attempt in (lambda: plan(loaded), lambda: run(loaded, ("train",))):
        with pytest.raises(ModelError, match=re.escape(why)):
            attempt()


ALL = (
    "evaluate.compare=[{mitigate: {use: vti, masks: 2}}, {mitigate: {use: var, tau: 0.5, calibration: auto}}, "
    "{mitigate: truthprint}, {mitigate: ara}]"
)


def captions(ids):
    """Every question answered alike, whatever it is."""
    return lambda self, prompts: [list(ids) for _ in prompts]


def test_every_method_finds_what_it_asks_for_in_the_training_data(train, recipe, monkeypatch):
    folder = train()
    loaded = load_recipe(recipe, [ALL, f"run.dir={folder}", "evaluate.batch=10"])
    assert "vlm calibrate`: ara, truthprint, var, vti." in plan(loaded)
    tokenizer = build_tokenizer(loaded)
    ids = tokenizer.encode("i see a cup and a dog, no stop sign.", add_special_tokens=False)
    monkeypatch.setattr(Asker, "generate", captions(ids))
    monkeypatch.setitem(SAMPLES, "judged", 60)
    files = {path.name.split("-")[0]: contents(path, "x") for path in calibrate(loaded, samples=None)}
    store = Store(load_manifest([str(loaded.data.sources["scenes"].shards[0])]))
    samples = list(store)
    texts = [s.messages[1].content[0].text for s in samples if len(s.messages[1].content[0].text.split()) >= 3]
    assert json.loads(files["ara"].about["captions"]) == texts
    named = [tag in s.tags for s in samples[:60] for tag in ("cup", "dog", "stop sign")]
    assert files["truthprint"].about["mentions"] == "180"
    assert files["truthprint"].about["made_up"] == str(named.count(False))
    assert files["vti"].tensors["text"].shape == (2, 16) and files["vti"].tensors["image"].shape[0] == 1
    assert 1 <= len(files["var"].tensors["dims"]) <= 2
    assert "Found on" not in plan(loaded)
    model = for_evaluation(loaded, build_model(loaded, tokenizer))
    trained_weights(loaded, model)
    for row in loaded.comparisons:
        program = program_of(row, model.facts)
        assert bool(program) != ("var" in row.title)  # two layers have no sinks


def test_what_is_asked_of_the_samples(train, recipe, monkeypatch):
    loaded = load_recipe(recipe, [f"run.dir={train()}"])
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    ids = tokenizer.encode("i see a cup and a dog, no stop sign.", add_special_tokens=False)
    monkeypatch.setattr(Asker, "generate", captions(ids))
    samples = Samples(loaded, model, tokenizer, count=12)
    (judged,) = samples.judged
    for sample, mentions in zip(samples.store, judged.mentions, strict=False):
        starts = [tokenizer.decode([ids[token]]).split()[0] for token, _ in mentions]
        assert starts == ["cup", "dog", "stop"]
        assert [wrong for _, wrong in mentions] == [name not in sample.tags for name in ("cup", "dog", "stop sign")]
    found = samples.described[0]
    captioned = [s for s in samples.store if is_caption(s)][:12]
    for sample, right, wrong in zip(captioned, found.texts, found.wrong, strict=True):
        assert right == sample.messages[1].content[0].text
        objects = {mention.object for mention in samples.vocabulary.mentions(wrong)}
        assert objects and not objects & set(sample.tags) and len(wrong.split()) >= 3
    inputs = found.inputs
    for row, valid, text in zip(inputs.tokens, inputs.valid, found.texts, strict=True):
        shown = tokenizer.decode([token for token in row[valid].tolist() if token >= 0])
        assert text not in shown and len(shown) > 0
    monkeypatch.setattr(Samples, "_is_known", lambda self, sample: False)
    with pytest.raises(
        RecipeError, match=r"expected pictures with the names of their objects as tags in the source sc"
    ):
        _ = Samples(loaded, model, tokenizer).judged


def test_nothing_to_calibrate(recipe):
    with pytest.raises(RecipeError, match="expected a mitigator with calibration: auto; found no method in the recipe"):
        calibrate(load_recipe(recipe))
