"""Calibration: a plan tells that it is due, an evaluation makes it, for this model only; what it finds is kept."""

import re

import pytest

from vlm.calibrate import calibrate
from vlm.commands import main
from vlm.models.errors import ModelError
from vlm.models.program.artifact import contents, write
from vlm.plan import plan
from vlm.recipe import RecipeError, load_recipe
from vlm.run import run

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
    with pytest.raises(
        ModelError, match=r"zerotuning.calibration: .* at nowhere\.safetensors; found no file; run"
    ):
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


def test_nothing_to_calibrate(recipe):
    with pytest.raises(RecipeError, match="expected a mitigator with calibration: auto; found no method in the recipe"):
        calibrate(load_recipe(recipe))
