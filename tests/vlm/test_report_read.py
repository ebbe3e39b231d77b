"""Reading a run folder: what is cut off or missing is noted, what is malformed is one clear line."""

import base64
import json
from pathlib import Path

import pytest

from vlm.report import ReportError
from vlm.report.read import read_run, read_stages

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def line(step: int, loss: float | None = 1.0, stage: int = 0, steps: int = 30, **more) -> str:
    return json.dumps({"stage": stage, "name": f"s{stage}", "step": step, "steps": steps, "loss": loss, **more})


def test_curves_are_per_stage_and_nested_numbers_are_flat():
    notes: list[str] = []
    written = [line(10, lr={"vision": 0.1}), line(30, tag_accuracy=0.5), line(30, stage=1)]
    first, second = read_stages("\n".join(written) + "\n", notes)
    assert (first.name, first.planned, first.steps) == ("s0", 30, [10, 30])
    assert first.curves["loss"] == [1.0, 1.0]
    assert first.curves["lr.vision"][0] == 0.1 and first.curves["tag_accuracy"][1] == 0.5
    assert first.curves["lr.vision"][1] != first.curves["lr.vision"][1]  # NaN where it was not logged
    assert second.steps == [30] and notes == []


def test_a_last_line_that_a_kill_cut_off_is_noted():
    notes: list[str] = []
    (stage,) = read_stages(line(20) + "\n" + line(30)[:-9], notes)
    assert stage.steps == [20]
    assert notes == ["The last line of metrics.jsonl is cut off (the run was stopped while writing it).",
                     "Stage s0: the last logged step is 20 of 30."]  # fmt: skip


def test_after_a_resume_the_later_lines_count():
    notes: list[str] = []
    lines = [line(step, loss) for step, loss in [(10, 1.0), (20, 2.0), (30, 3.0), (20, 5.0), (30, 6.0)]]
    (stage,) = read_stages("\n".join(lines), notes)
    assert (stage.steps, stage.curves["loss"]) == ([10, 20, 30], [1.0, 5.0, 6.0])
    assert notes == ["The run was resumed and ran some steps again; the curves show what was logged last."]


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_loss_that_is_not_a_number_is_noted(loss: float | None):
    notes: list[str] = []
    read_stages("\n".join([line(10), line(20, loss), line(30)]), notes)
    assert notes == ["Stage s0: the loss is missing or not finite, first at step 20."]


@pytest.mark.parametrize("last", [29, 30])
def test_an_interrupted_stage_is_noted_but_not_one_that_counts_from_nought(last: int):
    notes: list[str] = []
    (stage,) = read_stages("\n".join([line(10), line(last)]), notes)
    assert notes == [] and stage.done == 30
    read_stages("\n".join([line(5), line(10)]), notes)
    assert notes == ["Stage s0: the last logged step is 10 of 30."]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"stage": 0,', "metrics.jsonl:2: expected one JSON object"),
        ("[1]", "metrics.jsonl:2: expected one JSON object, found list"),
        ('{"stage": 0}', "metrics.jsonl:2: step: expected a whole number, found None"),
        ('{"stage": "0", "step": 1}', "metrics.jsonl:2: stage: expected a whole number, found '0'"),
    ],
)
def test_a_malformed_line_inside_is_an_error_with_its_number(bad: str, message: str):
    with pytest.raises(ReportError) as error:
        read_stages("\n".join([line(10), bad, line(20)]), [])
    assert str(error.value).startswith(message)


def write(folder: Path, **contents: object) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def results(**scores: object) -> dict:
    return {"results": [{"label": "plain", "metrics": {"pope_random": scores}}]}


def view(**more: object) -> dict:
    views = [{"label": "plain", "grid": [2, 2], "answer": "a cup", **more}]
    return {"items": [{"key": "k", "png": PNG, "width": 8, "height": 8, "views": views}]}


def mention(start: int, end: int) -> dict:
    return {"text": "cup", "start": start, "end": end, "object": "cup", "hallucinated": False}


@pytest.mark.parametrize(
    ("evaluation", "pictures", "message"),
    [
        ('{"results": [', {}, "evaluation.json: Invalid JSON"),
        (results(accuracy=91.2), {}, "evaluation.json: results.0.metrics.pope_random.accuracy: "),
        (results(accuracy="0.9"), {}, "evaluation.json: results.0.metrics.pope_random.accuracy: "),
        (results(accuracy=0.9, ci=[0.8]), {}, "evaluation.json: results.0.metrics.pope_random.ci.1: "),
        (results(chair_s=0.9, length=-1), {}, "evaluation.json: results.0.metrics.pope_random.length: "),
        ({"results": [{}]}, {}, "evaluation.json: results.0.label: "),
        ({}, view(kept=[0, 4]), "pictures.json: items.0.views.0: kept: expected raster ids below 4, found 4"),
        ({}, view(kept=[-1]), "pictures.json: items.0.views.0: kept: expected raster ids below 4, found -1"),
        ({}, view(heat=[1, 2]), "pictures.json: items.0.views.0: heat: expected 4 numbers for the grid, found 2"),
        ({}, view(heat=[1, 2, 3, -1]), "pictures.json: items.0.views.0.heat.3: "),
        ({}, view(mentions=[mention(2, 6)]), "pictures.json: items.0.views.0: mentions: 'cup' at 2..6 "),
        ({}, view(mentions=[mention(2, 4), mention(3, 5)]), "pictures.json: items.0.views.0: mentions: 'cup' at 3..5"),
        ({}, {"items": [{"key": "k", "png": "R0lGODlh", "width": 1, "height": 1}]}, "pictures.json: items.0: png: "),
        ({}, {"items": [{"key": "k", "png": "\"><b>", "width": 1, "height": 1}]}, "pictures.json: items.0: "),
    ],
)  # fmt: skip
def test_malformed_files_are_named_with_the_place(tmp_path: Path, evaluation: object, pictures: object, message: str):
    with pytest.raises(ReportError) as error:
        read_run(write(tmp_path, evaluation=evaluation, pictures=pictures))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(ReportError, match="expected the folder of a run, found nothing"):
        read_run(tmp_path / "missing")
    with pytest.raises(ReportError, match=r"expected metrics\.jsonl or evaluation\.json of a run, found neither"):
        read_run(tmp_path)


def test_a_recipe_that_is_not_yaml_or_not_text(tmp_path: Path):
    write(tmp_path, evaluation={})
    (tmp_path / "recipe.yaml").write_text("name: [")
    with pytest.raises(ReportError, match=r"^recipe\.yaml: "):
        read_run(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ReportError, match=r"^recipe\.yaml: expected UTF-8"):
        read_run(tmp_path)


def test_the_name_comes_from_the_recipe_then_the_evaluation_then_the_folder(tmp_path: Path):
    write(tmp_path, evaluation={})
    assert read_run(tmp_path).name == tmp_path.name
    write(tmp_path, evaluation={"name": "second"})
    assert read_run(tmp_path).name == "second"
    (tmp_path / "recipe.yaml").write_text("name: first\n")
    assert read_run(tmp_path).name == "first"
