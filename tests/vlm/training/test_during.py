"""Benchmarks while training: what they write, and that they leave no trace in what is learned."""

import json
from pathlib import Path

import pytest
import torch

from vlm.commands import main
from vlm.data.errors import DataError
from vlm.recipe import RecipeError, load_recipe
from vlm.report import write_report
from vlm.run import run
from vlm.training import checkpoints

ASK = """
prune: {{use: fastv, keep: 50%, layer: 1}}
evaluate:
  benchmarks:
    pope: {{images: {scenes}/test, questions: [{scenes}/benchmarks/pope_random.json]}}
    chair: {{images: {scenes}/test, truth: {scenes}/benchmarks/chair.json, synonyms: {scenes}/benchmarks/synonyms.txt,
      max_new_tokens: 8}}
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    return checkpoints.read(newest.path)["state_dict"]


@pytest.fixture
def asked(recipe: Path, scenes: Path) -> Path:
    recipe.write_text(recipe.read_text() + ASK.format(scenes=scenes))
    return recipe


def test_it_changes_nothing_and_its_last_word_is_the_evaluation_s(asked, train, tmp_path):
    plain = train(to="plain")
    during = train("evaluate.during={every: 4, limit: 6}", to="during")
    first, second = weights(plain), weights(during)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    lines = [json.loads(line) for line in (during / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(0, 3), (0, 5), (1, 3), (1, 7), (1, 9)]
    assert all(set(line["metrics"]) == {"pope_random", "chair"} for line in lines)

    limits = [f"evaluate.benchmarks.{label}.limit=6" for label in ("pope", "chair")]
    run(load_recipe(asked, [*limits, f"run.dir={during}"]), ("evaluate",))
    [result] = json.loads((during / "evaluation.json").read_text())["results"]
    assert lines[-1]["metrics"] == result["metrics"]

    page = write_report(during).read_text()
    assert "CHAIR, while training" in page and "POPE random accuracy, while training" in page


def test_a_resumed_run_asks_again_what_it_trains_again(asked, train):
    folder = train("evaluate.during={every: 2, limit: 6, benchmarks: pope}")
    log = folder / "evaluations.jsonl"
    whole = [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()]
    newest = max((folder / "checkpoints").glob("*.ckpt"))
    newest.unlink()
    train("evaluate.during={every: 2, limit: 6, benchmarks: pope}")
    assert [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()] == whole


def test_bad_words_are_refused_before_training(asked, scenes, train, capsys):
    with pytest.raises(RecipeError, match=r"benchmarks\.0 is unknown; did you mean 'pope'"):
        load_recipe(asked, ["evaluate.during={every: 2, benchmarks: poep}"])
    questions = scenes / "benchmarks/pope_random.json"
    lines = questions.read_text().splitlines()
    broken = asked.parent / "broken.json"
    changed = [json.dumps({**json.loads(line), "image": f"test/none{n}"}) for n, line in enumerate(lines[:12])]
    broken.write_text("\n".join([*changed, *lines[12:24]]))
    said = ["evaluate.during={every: 2, limit: 24}", f"evaluate.benchmarks.pope.questions=[{broken}]"]
    with pytest.raises(DataError, match=r"benchmark pope: 12 of \d+ images are missing in .*none0, .*none9 and 2 more"):
        train(*said)
    assert main(["train", str(asked), *said]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_key_that_a_checkpoint_did_not_know_counts_as_its_default(recipe, train):
    folder = train()
    point = checkpoints.newest(folder / "checkpoints")
    assert point is not None
    content, identity = checkpoints.read(point.path), load_recipe(recipe).identity()
    old = content["recipe"]
    old["resolved"] = "\n".join(line for line in old["resolved"].splitlines() if line.strip() != "drop_image: 0.0")
    del old["identity"]["stages"][0]["drop_image"]
    checkpoints.check_recipe(content, point.path, identity)
    identity["stages"][0]["drop_image"] = 0.5
    with pytest.raises(checkpoints.TrainingError, match=r"stages\.0\.drop_image = 0\.5, found 0"):
        checkpoints.check_recipe(content, point.path, identity)
