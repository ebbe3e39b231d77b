"""``vlm calibrate``: what it finds is the best of what it tried, is kept for this model only, and is asked for."""

import pytest

from vlm.calibrate import calibrate
from vlm.commands import main
from vlm.models.errors import ModelError
from vlm.plan import plan
from vlm.recipe import load_recipe

ROW = "evaluate.compare=[{mitigate: {use: zerotuning, calibration: auto, objective: entropy, layers: [0, 0]}}]"


def test_from_the_command_to_the_program(train, recipe, tmp_path, capsys):
    folder = train()
    words = [f"run.dir={folder}", ROW]
    loaded = load_recipe(recipe, words)
    with pytest.raises(ModelError, match=r"found no file; run `vlm calibrate RECIPE --method zerotuning` first"):
        plan(loaded)
    assert main(["calibrate", str(recipe), "--samples", "6", *words]) == 0
    (path,) = (folder / "calibration").glob("zerotuning-*.safetensors")
    assert str(path) in capsys.readouterr().out
    assert "zerotuning" in plan(loaded)
    other = load_recipe(recipe, [words[0], ROW.replace("[0, 0]", "[1, 1]")])
    with pytest.raises(ModelError, match="found no file"):
        plan(other)
    assert calibrate(loaded, samples=6) == [path]
