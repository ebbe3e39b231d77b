"""One command does everything a recipe says: data, stages, evaluation, report."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.build import build_model, build_tokenizer, for_evaluation, make_data
from vlm.calibrate import calibrate_missing
from vlm.evaluation.during import watchers_of
from vlm.evaluation.evaluate import evaluate
from vlm.plan import programs_of, table
from vlm.progress import Progress
from vlm.recipe import Recipe, RecipeError
from vlm.report import write_report
from vlm.report.findings import find
from vlm.report.read import read_run
from vlm.report.records import Chair, Evaluation, Other, YesNo
from vlm.training.launch import OUTSIDE_RANKS, is_first_rank
from vlm.training.ranks import gather, known, meet, share
from vlm.training.train import train
from vlm.training.weights import find_weights, trained_weights

PARTS = ("data", "train", "evaluate", "report")


def run(recipe: Recipe, parts: Sequence[str] = PARTS) -> None:
    """Do the named parts of a recipe, in order; with several processes all train and answer, the first does the rest.

    A recipe with ``run.weights`` is evaluated and reported, with the weights of the run that it names; so is one
    without stages, with those of its checkpoint.
    Raises RecipeError, DataError, ModelError or TrainingError with one line for the user.
    """
    folder = Path(recipe.run.dir)
    if recipe.run.weights is not None or not recipe.stages:
        parts = _without_training(recipe, parts)
    if "data" in parts and recipe.data.make is not None:
        _make_once(recipe, folder / ".data-made")
    if {"train", "evaluate"} & set(parts):
        _train_and_evaluate(recipe, folder, parts)
    if "report" in parts and is_first_rank():
        print(f"Report: {write_report(folder)}")


def _without_training(recipe: Recipe, parts: Sequence[str]) -> list[str]:
    """The parts that are left when another run did the training; its weights must be there before anything begins."""
    if "train" in parts and "evaluate" not in parts:
        if not recipe.stages:
            raise RecipeError("stages: there are none, so nothing trains; `vlm evaluate` judges model.from as it is")
        instead = f"evaluates {recipe.run.weights} and trains nothing; set run.weights=null to train"
        raise RecipeError(f"run.weights: this recipe {instead}")
    if "evaluate" in parts:
        find_weights(recipe)
    return [part for part in parts if part != "train"]


def _make_once(recipe: Recipe, mark: Path) -> None:
    """The first process makes the data; processes that a launcher started beside it wait for its mark."""
    launch = " ".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_PORT"))
    if is_first_rank():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        _make(recipe)
        mark.write_text(launch)
        return
    if not any(name in os.environ for name in OUTSIDE_RANKS):
        return
    time.sleep(1.0)  # the first process takes away the mark of an earlier launch
    while not mark.exists() or mark.read_text() != launch:
        time.sleep(0.5)


def _make(recipe: Recipe) -> None:
    progress: list[Progress] = []

    def tick(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress("make data", total))
        progress[0].update(done)

    make_data(recipe, tick)


def _train_and_evaluate(recipe: Recipe, folder: Path, parts: Sequence[str]) -> None:
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    programs_of(recipe, model.facts)  # a program that does not fit is refused before hours of training
    if "train" in parts:
        train(recipe, model, tokenizer, watchers_of(recipe, model, tokenizer))
    if "evaluate" in parts:
        meet()
        if is_first_rank() or known():
            _evaluate(recipe, folder, model, tokenizer)


def _evaluate(recipe: Recipe, folder: Path, model: Any, tokenizer: Any) -> None:
    gather(None)  # the first rank has written the last checkpoint
    weights, first = trained_weights(recipe, model), is_first_rank()
    model = for_evaluation(recipe, model)
    if first:
        if recipe.run.weights is not None or not recipe.stages:  # the folder of a run that trains has it from there
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(recipe.to_yaml())
        print(f"Evaluating {weights}")  # the newest checkpoint, be it of a run that is not done yet
    share(lambda: calibrate_missing(recipe, model, tokenizer) if first else None)
    evaluate(recipe, model, tokenizer, weights)
    if first:
        print("\n".join(found(folder)))


def found(folder: Path) -> list[str]:
    """What the evaluation in ``folder`` found, as lines for the terminal."""
    evaluation = read_run(folder).evaluation
    facts = [f"* {finding.text}" for finding in find(evaluation) if finding.kind == "fact"]
    rest = "* What each pruner and mitigator changed, with intervals and pictures, is in the report."
    return ["", *table(_rows(evaluation)), "", *facts, rest]


def _rows(evaluation: Evaluation) -> list[list[str]]:
    """Main numbers of every result, in percent; words per answer where answers have a length."""
    names = list(dict.fromkeys(name for result in evaluation.results for name in result.metrics))
    rows = [["", *names]]
    for result in evaluation.results:
        rows.append([result.label, *(_cell(result.metrics.get(name)) for name in names)])
    return rows


def _cell(scores: YesNo | Chair | Other | None) -> str:
    if isinstance(scores, Chair):
        length = "" if scores.length is None else f" ({scores.length:.0f} words)"
        return f"Cs {100 * scores.chair_s:.1f}{length}"
    return f"{100 * scores.accuracy:.1f}" if isinstance(scores, YesNo) else ""
