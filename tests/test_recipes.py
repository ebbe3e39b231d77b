"""Every shipped recipe is planned; a shrunk copy of it trains, resumes, evaluates and reports."""

import json
from pathlib import Path

import pytest

from vlm.build import build_encoder, build_model, build_tokenizer, program_of
from vlm.commands import main
from vlm.create import names
from vlm.evaluation.cost import prompt_cost
from vlm.evaluation.forecast import forecast
from vlm.evaluation.stand_in import prompt
from vlm.models.program.attach import attach
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


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


@pytest.mark.parametrize(("kind", "file"), [("prune", "scenes_pruners"), ("kv", "scenes_kv")])
def test_every_pruner_and_cache_policy_is_compared_on_scenes(kind, file):
    rows = load_recipe(FOLDER / f"{file}.yaml").evaluate.compare
    methods = [str(method.use) for row in rows if (method := getattr(row, kind))]
    assert sorted(set(methods)) == names(kind)
    assert all(methods.count(name) > 1 for name in names(kind))  # budgets


@pytest.mark.parametrize("file", ["scenes_pruners", "scenes_kv"])
def test_every_row_runs_and_costs_what_the_plan_says(file, stand_ins):
    recipe = load_recipe(FOLDER / f"{file}.yaml", [f"model.language.tokenizer={stand_ins / 'scenes/tokenizer'}"])
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer).eval()
    shape = model.facts.shape
    assert isinstance(model, VisionLanguageModel) and shape is not None
    inputs = prompt(64, side=48, vocabulary=len(tokenizer))
    for row in recipe.comparisons:
        program = program_of(row, model.facts)
        told = forecast(program, model.visual_tokens, shape)
        with attach(model, program):
            found = prompt_cost(model, inputs)
        if not told.most:
            assert found["visual_tokens"]["per_layer"] == list(told.main.visual), row.title
        # an entry per layer, where layers divide a budget by what they attend to and round it
        assert found["kv_bytes_per_prompt"] <= told.kv_bytes + shape.layers * shape.kv_bytes(1), row.title


@pytest.mark.parametrize(("file", "resize"), [("llava15_7b", "pad"), ("nanovlm_222m", "stretch")])
def test_a_recipe_says_how_pictures_become_squares(file, resize, shrunk):
    recipe = load_recipe(FOLDER / f"{file}.yaml", shrunk(FOLDER / f"{file}.yaml"))
    tokenizer = build_tokenizer(recipe)
    encoder = build_encoder(recipe, build_model(recipe, tokenizer, meta=True), tokenizer)
    assert encoder.transform.resize == resize


def written(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_recipe_with_the_weights_of_another_run_writes_to_its_own_folder_only(shrunk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = str(FOLDER / "scenes_pruners.yaml")
    small = [word for word in shrunk(FOLDER / "scenes.yaml") if "counterfactual" not in word]
    few = "evaluate.compare=[{}, {prune: {use: stride, keep: 25%}}]"
    assert main(["run", file, *small, few]) == 2
    assert capsys.readouterr().err == (
        "error: runs/scenes/checkpoints: expected a checkpoint of this run, found none; train that run first, or set "
        "run.weights=null\n"
    )
    assert main(["run", str(FOLDER / "scenes.yaml"), *small, "evaluate.compare=[{}]"]) == 0
    before = written(Path("runs/scenes"))
    capsys.readouterr()
    assert main(["plan", file, *small, few]) == 0
    assert "Weights: those of runs/scenes; nothing is trained here." in capsys.readouterr().out
    assert main(["run", file, *small, few]) == 0
    assert written(Path("runs/scenes")) == before
    run = Path("runs/scenes-pruners")
    assert {path.name for path in run.iterdir()} >= {"recipe.yaml", "evaluation.json", "pictures.json", "report.html"}
    evaluation = json.loads((run / "evaluation.json").read_text())
    newest = max((tmp_path / "runs/scenes/checkpoints").glob("*.ckpt"))
    assert evaluation["weights"] == str(newest.relative_to(tmp_path))
    plain, pruned = (result["cost"] for result in evaluation["results"])
    assert pruned["visual_tokens"]["per_layer"] == [9] * 4
    assert plain["prefill_s"] > 0 and pruned["prefill_s"] > 0
    capsys.readouterr()

    assert main(["evaluate", file, *small, few, f"run.weights={newest}"]) == 0
    assert main(["train", file, *small]) == 2
    assert "run.weights: this recipe evaluates runs/scenes and trains nothing" in capsys.readouterr().err
    assert main(["evaluate", file, *small, few, "model.vision.dim=32"]) == 2
    assert "belongs to another recipe" in capsys.readouterr().err
