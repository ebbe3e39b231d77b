"""Every shipped recipe is planned; a shrunk copy of it trains, resumes, evaluates and reports."""

import json
from pathlib import Path

import pytest

from vlm.commands import main
from vlm.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned(path, shrunk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(path), *shrunk(path)]) == 0
    assert "Stage" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # planning writes nothing


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shrunk_copy_trains_resumes_evaluates_and_reports(path, shrunk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = shrunk(path)
    recipe = load_recipe(path, small)
    run = Path(recipe.run.dir)
    stages = len(recipe.stages)
    assert main(["train", str(path), *small]) == 0
    consumed = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in consumed] == [(s, t) for s in range(stages) for t in range(4)]

    newest = max((run / "checkpoints").glob("*.ckpt"))
    newest.unlink()  # as if the run had been killed between its last two checkpoints
    assert main(["run", str(path), *small]) == 0
    again = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert again == consumed
    assert newest.exists()

    evaluation = json.loads((run / "evaluation.json").read_text())
    assert len(evaluation["results"]) == max(1, len(recipe.evaluate.compare))
    for result in evaluation["results"]:
        for label in recipe.evaluate.benchmarks:
            assert any(name.startswith(label) for name in result["metrics"])
        for name, metric in result["metrics"].items():
            assert metric["n"] >= 6 and 0 <= metric["ci"][0] <= metric["ci"][1] <= 1
            assert {"prompt", "decoding", "files", "n"} <= set(result["protocol"][name])
    assert (run / "report.html").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "plain" in out and "report.html" in out
