"""Training: the stages of a recipe one after the other, from wherever the run stands."""

import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import PreTrainedTokenizerBase

from vlm.create import create
from vlm.data.stream import BadSamplePolicy
from vlm.models.base import BaseVlm
from vlm.models.pack import packed_attention
from vlm.recipe import Recipe
from vlm.training import checkpoints
from vlm.training.launch import is_first_rank
from vlm.training.memory import switched
from vlm.training.module import TrainingModule
from vlm.training.reference import NAME as REFERENCE
from vlm.training.reference import Measure
from vlm.training.sharding import working_copy, write_back
from vlm.training.stages import wants_pairs
from vlm.training.stop import Stop, Told, listening
from vlm.training.strategy import SHARDED
from vlm.training.trainer import LOGS, open_trainer
from vlm.training.work import Sources, StageWork, open_sources, open_stage
from vlm.training.zero import check_zero
from vlm.versions import versions

# Lightning advertises and counts devices at every fit; what a user needs to see is in our own progress and audit.
for _library in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_library).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="Found .* module.* in eval mode", module="lightning")
warnings.filterwarnings("ignore", message="You're resuming from a checkpoint", module="lightning")  # data state is ours
warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`", module="lightning")
warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", module="lightning")

Watchers = Callable[[int, int], list[Callback]]


def train(
    recipe: Recipe, model: BaseVlm, tokenizer: PreTrainedTokenizerBase, watchers: Watchers = lambda stage, steps: []
) -> None:
    """Train every stage that is not done yet; ``model`` then holds the trained weights.

    watchers: callbacks besides our own, for the number of a stage and its steps.

    Raises TrainingError for a checkpoint of another recipe, a full disk or a loss that is not finite.
    """
    check_zero(recipe.run)
    folder = Path(recipe.run.dir) / "checkpoints"
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = _where_to_start(recipe, folder)
    sources = open_sources(recipe)
    identity = recipe.identity()
    if start is not None:
        content = checkpoints.read(start.path)
        checkpoints.check_recipe(content, start.path, identity)
        checkpoints.load_weights(model, content, start.path)
        if is_first_rank():
            checkpoints.forget_after(start, folder)
    else:
        if recipe.model.weights is not None:
            begin = checkpoints.of_run(Path(recipe.model.weights), "model.weights")
            checkpoints.load_start(model, checkpoints.read(begin), begin)
        if is_first_rank():
            _clear(Path(recipe.run.dir))
    if is_first_rank():
        (folder.parent / "recipe.yaml").write_text(recipe.to_yaml())
    with listening() as told:
        for number in range(len(recipe.stages)):
            if start is not None and start.stage > number:
                continue
            resumed = start if start is not None and start.stage == number else None
            work = open_stage(recipe, number, model, tokenizer, sources)
            if resumed is None or resumed.step < work.layout["steps"]:
                _train_stage(recipe, number, work, model, sources, resumed, watchers, told)


def _where_to_start(recipe: Recipe, folder: Path) -> checkpoints.Checkpoint | None:
    resume = recipe.run.resume
    if resume == "never":
        return None
    return checkpoints.newest(folder) if resume == "auto" else checkpoints.point_of(Path(resume))


def _clear(folder: Path) -> None:
    """A run from the start leaves nothing of an earlier run that could be taken for its own."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in (*LOGS, "evaluation.json", "pictures.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(REFERENCE.format("*")):
        path.unlink()


def _train_stage(
    recipe: Recipe,
    number: int,
    work: StageWork,
    model: BaseVlm,
    sources: Sources,
    resumed: checkpoints.Checkpoint | None,
    watchers: Watchers,
    told: Told,
) -> None:
    seed_everything(recipe.seed + number, verbose=False)
    working = working_copy(model) if recipe.run.parallel in SHARDED else model
    module = _module(recipe, number, work, model, working, sources)
    trainer = open_trainer(recipe, number, work.layout, resumed.step if resumed else 0, told)
    trainer.callbacks.extend(watchers(number, work.layout["steps"]))  # type: ignore[attr-defined]
    if wants_pairs(work.objective) and module.objective.needs_start:
        about = {"recipe": recipe.identity_hash(), "data": {n: sources.manifests[n].hash for n in work.stage.mix}}
        measure = Measure(Path(recipe.run.dir), number, work.pairs(), about, resumed is not None)
        trainer.callbacks.append(measure)  # type: ignore[attr-defined]
    data = work.data(BadSamplePolicy(recipe.data.on_bad_sample.consecutive, recipe.data.on_bad_sample.skip))
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.run.threads or threads)  # of training: an evaluation takes all there are
    try:
        with switched(recipe, working), packed_attention(working) if work.packing else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=resumed.path if resumed else None, weights_only=True)
        if working is not model:
            write_back(working, model)
    finally:
        module.detach()
        torch.set_num_threads(threads)
    if trainer.interrupted:
        raise KeyboardInterrupt
    _end_if_told(trainer, Path(recipe.run.dir))


def _module(
    recipe: Recipe, number: int, work: StageWork, model: BaseVlm, working: BaseVlm, sources: Sources
) -> TrainingModule:
    """The Lightning module of a stage. ``working`` is trained for ``model``, where an engine takes parameters apart."""
    prune, left_out = recipe.prune, checkpoints.untrained(recipe, model)
    return TrainingModule(
        working,
        work.objective.build(working, sources.tags),
        work.objective.per,
        work.stage,
        work.layout["steps"],
        work.layout["global_batch"],
        create("prune", prune) if prune else None,
        tuple(create("mitigate", method) for method in recipe.mitigate),
        prune.schedule if prune else None,
        note={
            "recipe": {"identity": recipe.identity(), "resolved": recipe.to_yaml(), "hash": recipe.hash()},
            "versions": versions(),
            "classes": list(sources.tags),  # what the outputs of a classifying objective are
            "data": {name: manifest.hash for name, manifest in sources.manifests.items()},
            **({"base": checkpoints.fingerprint(model, left_out)} if left_out else {}),
        },
        seed=recipe.seed + number,
        leave_out=left_out,
    )


def _end_if_told(trainer: Trainer, folder: Path) -> None:
    """A run that its scheduler stopped has saved, and is no failure: the same command goes on from there."""
    stops = [callback.done for callback in trainer.callbacks if isinstance(callback, Stop)]  # type: ignore[attr-defined]
    if stops and stops[0] is not None:
        last = checkpoints.newest(folder / "checkpoints")
        if is_first_rank() and last is not None:
            print(f"stopped by SIGTERM, saved {last.path}; the same command goes on from it", file=sys.stderr)
        raise SystemExit(0)
