"""Training: the stages of a recipe one after the other, from wherever the run stands."""

import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import PreTrainedTokenizerBase

from vlm.build import build_collate, build_encoder
from vlm.create import create
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.index import Manifest, load_manifest
from vlm.data.pairs import CollatePairs, PairEncoder
from vlm.data.store import Store
from vlm.data.stream import BadSamplePolicy, Packing
from vlm.models.base import BaseVlm
from vlm.models.pack import packed_attention
from vlm.packing import fill_of, packing_of
from vlm.progress import Progress
from vlm.recipe import Recipe
from vlm.recipe.schema import Stage
from vlm.training import checkpoints
from vlm.training.callbacks import Save, Trace, Watch, keep_lines_before
from vlm.training.datamodule import StageData
from vlm.training.errors import TrainingError
from vlm.training.loggers import open_loggers
from vlm.training.memory import switched
from vlm.training.module import TrainingModule
from vlm.training.reference import NAME as REFERENCE
from vlm.training.reference import Measure, Pairs
from vlm.training.sharding import working_copy, write_back
from vlm.training.stages import check_stage, wants_pairs
from vlm.training.stop import Stop, Told, listening
from vlm.training.strategy import SHARDED, environment, strategy
from vlm.training.zero import check_zero

# Lightning advertises and counts devices at every fit; what a user needs to see is in our own progress and audit.
for _library in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_library).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="Found .* module.* in eval mode", module="lightning")
warnings.filterwarnings("ignore", message="You're resuming from a checkpoint", module="lightning")  # data state is ours
warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`", module="lightning")
warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", module="lightning")

# Set in every process by a launcher from outside; Lightning's own launcher starts the others after the data are made.
OUTSIDE_RANKS = ("RANK", "SLURM_PROCID")

LOGS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")  # a line for a step of a stage

PACKAGES = ("torch", "transformers", "peft", "lightning", "timm", "webdataset", "vlm-recipes")


class Sources(NamedTuple):
    """The recipe's data sources, opened."""

    manifests: dict[str, Manifest]
    stores: dict[str, Store]

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag of every source, sorted."""
        return tuple(sorted({tag for manifest in self.manifests.values() for tag in manifest.tags}))


Watchers = Callable[[int, int], list[Callback]]


def open_sources(recipe: Recipe) -> Sources:
    """Read the manifests of all sources of the recipe."""
    manifests = {name: load_manifest(list(source.shards)) for name, source in recipe.data.sources.items()}
    return Sources(manifests, {name: Store(manifest) for name, manifest in manifests.items()})


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {package: version(package) for package in PACKAGES}


def is_first_rank() -> bool:
    """Whether this process is the first of its launch: torchrun's, SLURM's, or Lightning's own on one machine."""
    return next((int(os.environ[name]) for name in (*OUTSIDE_RANKS, "LOCAL_RANK") if name in os.environ), 0) == 0


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
        for number, stage in enumerate(recipe.stages):
            if start is not None and start.stage > number:
                continue
            resumed = start if start is not None and start.stage == number else None
            _train_stage(recipe, number, stage, model, tokenizer, sources, resumed, watchers, told)


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


def stage_steps(
    stage: Stage, global_batch: int, stores: list[Store], encoder: Any, packing: Packing | None = None, seed: int = 0
) -> int:
    """Steps of a stage; a length in tokens counts the mean of the first 256 samples of each source, and what a pack
    holds is told by the first 512 samples of the mixture. Without a length it is one round of all repeats."""
    if stage.steps is not None:
        return stage.steps
    samples = stage.samples
    if samples is None and stage.tokens is None:
        samples = sum(round(times) * len(store) for times, store in zip(stage.mix.values(), stores, strict=True))
    if packing is not None:
        fill = fill_of(stage, stores, seed, packing)
        step = fill.samples if samples is not None else fill.share * packing.config.tokens
        return max(1, math.ceil((samples or stage.tokens or 0) / (step * global_batch)))
    if samples is not None:
        return -(-samples // global_batch)
    assert stage.tokens is not None
    total = sum(stage.mix.values())
    parts = zip(stores, stage.mix.values(), strict=True)
    mean = sum(weight / total * _mean_tokens(store, encoder) for store, weight in parts)
    return max(1, round(stage.tokens / (mean * global_batch)))


def _mean_tokens(store: Store, encoder: Any) -> float:
    """Mean length of the first samples of a source; unreadable ones are left to training, which counts them."""
    lengths = []
    for number in range(min(256, len(store))):
        with suppress(DataError, OSError):
            lengths.append(len(encoder(store.read(number), Draw(number, 0, 0)).tokens))
    if not lengths:
        raise DataError(f"{store.manifest.shards[0].address}: expected readable samples, found none among the first")
    return sum(lengths) / len(lengths)


def _train_stage(
    recipe: Recipe,
    number: int,
    stage: Stage,
    model: BaseVlm,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    resumed: checkpoints.Checkpoint | None,
    watchers: Watchers,
    told: Told,
) -> None:
    global_batch = stage.global_batch or recipe.run.global_batch
    encoder = build_encoder(recipe, model, tokenizer, stage.drop_image)
    stores = [sources.stores[name] for name in stage.mix]
    collate, objective = build_collate(encoder, tokenizer), create("objective", stage.objective)
    if wants_pairs(objective):
        check_stage(recipe, number, {name: sources.stores[name] for name in stage.mix})
        encoder, collate = PairEncoder(encoder), CollatePairs(collate)
    packing = packing_of(recipe, stage, model, encoder)
    steps = stage_steps(stage, global_batch, stores, encoder, packing, recipe.seed + number)
    if resumed is not None and resumed.step >= steps:
        return
    seed_everything(recipe.seed + number, verbose=False)
    micro = recipe.run.micro_batch or global_batch // recipe.run.world
    accumulate = global_batch // recipe.run.world // micro
    working = working_copy(model) if recipe.run.parallel in SHARDED else model
    prune, left_out = recipe.prune, checkpoints.untrained(recipe, model)
    built = objective.build(working, sources.tags)
    module = TrainingModule(
        working,
        built,
        objective.per,
        stage,
        steps,
        global_batch,
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
    tolerance = BadSamplePolicy(recipe.data.on_bad_sample.consecutive, recipe.data.on_bad_sample.skip)
    layout = {
        "global_batch": global_batch,
        "micro_batch": micro,
        "workers": recipe.data.workers,
        "seed": recipe.seed + number,
        "steps": steps,
    }
    weights = list(stage.mix.values())
    data = StageData(stores, weights, encoder, collate, layout, tolerance, packing, stage.repeat is not None)
    trainer = _trainer(recipe, number, stage, steps, accumulate, resumed, told)
    trainer.callbacks.extend(watchers(number, steps))  # type: ignore[attr-defined]
    if isinstance(encoder, PairEncoder) and built.needs_start:
        pairs = Pairs(stores, weights, encoder, collate, layout, stage.repeat is not None)
        about = {"recipe": recipe.identity_hash(), "data": {name: sources.manifests[name].hash for name in stage.mix}}
        measure = Measure(Path(recipe.run.dir), number, pairs, about, resumed is not None)
        trainer.callbacks.append(measure)  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.run.threads or threads)  # of training: an evaluation takes all there are
    try:
        with switched(recipe, working), packed_attention(working) if packing else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=resumed.path if resumed else None, weights_only=True)
        if working is not model:
            write_back(working, model)
    finally:
        module.detach()
        torch.set_num_threads(threads)
    if trainer.interrupted:
        raise KeyboardInterrupt
    _end_if_told(trainer, Path(recipe.run.dir))


def _end_if_told(trainer: Trainer, folder: Path) -> None:
    """A run that its scheduler stopped has saved, and is no failure: the same command goes on from there."""
    stops = [callback.done for callback in trainer.callbacks if isinstance(callback, Stop)]  # type: ignore[attr-defined]
    if stops and stops[0] is not None:
        last = checkpoints.newest(folder / "checkpoints")
        if is_first_rank() and last is not None:
            print(f"stopped by SIGTERM, saved {last.path}; the same command goes on from it", file=sys.stderr)
        raise SystemExit(0)


def _trainer(
    recipe: Recipe,
    number: int,
    stage: Stage,
    steps: int,
    accumulate: int,
    resumed: checkpoints.Checkpoint | None,
    told: Told,
) -> Trainer:
    folder, run = Path(recipe.run.dir), recipe.run
    done = resumed.step if resumed else 0
    first = is_first_rank()
    if first:
        for log in LOGS:
            keep_lines_before(folder / log, number, done)
    title = f"stage {number + 1}/{len(recipe.stages)} {stage.name}"
    progress = Progress(title, steps, quiet=not first, start=done)
    logs = open_loggers(recipe, stage.name, done) if first else []
    watch = Watch(number, stage.name, steps, folder / "metrics.jsonl", run.log_every, progress, logs)
    callbacks: list[Any] = [watch]
    if run.trace_samples:
        callbacks.append(Trace(number, folder / "samples.jsonl"))
    files = checkpoints.Files(run.save.background)
    save = Save(number, stage.name, steps, folder / "checkpoints", run.save.every, run.save.keep, files)
    callbacks += [save, Stop(save, told)]
    return Trainer(
        accelerator="auto",
        devices=run.devices,
        num_nodes=run.nodes,
        strategy=strategy(run),
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[run.precision],  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=stage.clip,
        callbacks=callbacks,
        plugins=[files, *environment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def find_weights(recipe: Recipe) -> Path:
    """The checkpoint that is evaluated: the newest of the run, or what ``run.weights`` means; of a recipe without
    stages what ``model.from`` names.

    Raises TrainingError when there is none.
    """
    other = recipe.run.weights
    if not recipe.stages and recipe.model.origin is not None:
        return Path(recipe.model.origin.name)
    if other is not None:
        return checkpoints.of_run(Path(other), "run.weights")
    folder = Path(recipe.run.dir) / "checkpoints"
    point = checkpoints.newest(folder)
    if point is None:
        raise TrainingError(f"{folder}: expected a checkpoint of this run, found none; run `vlm train` first")
    return point.path


def trained_weights(recipe: Recipe, model: BaseVlm) -> Path:
    """Load the checkpoint of :func:`find_weights` into ``model``, and say which it is.

    Raises TrainingError when there is none, or it is of another recipe.
    """
    path = find_weights(recipe)
    if not recipe.stages:
        return path  # the model holds them as it was built
    content = checkpoints.read(path)
    checkpoints.check_recipe(content, path, recipe.identity())
    checkpoints.load_weights(model, content, path)
    return path
