"""Lightning's trainer for one stage: engine, callbacks and logs as the recipe's ``run`` says."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from vlm.progress import Progress
from vlm.recipe import Recipe
from vlm.training import checkpoints
from vlm.training.callbacks import Save, Trace, Watch, keep_lines_before
from vlm.training.launch import is_first_rank
from vlm.training.loggers import open_loggers
from vlm.training.stop import Stop, Told
from vlm.training.strategy import environment, strategy

LOGS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")  # a line for a step of a stage


def open_trainer(recipe: Recipe, number: int, layout: dict[str, int], done: int, told: Told) -> Trainer:
    """The trainer of a stage of which ``done`` steps are trained already; their lines stay in the logs.

    layout: of :class:`~vlm.training.work.StageWork`. told: whether the scheduler asked to stop.
    """
    folder, run, stage, steps = Path(recipe.run.dir), recipe.run, recipe.stages[number], layout["steps"]
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
        accumulate_grad_batches=layout["global_batch"] // run.world // layout["micro_batch"],
        gradient_clip_val=stage.clip,
        callbacks=callbacks,
        plugins=[files, *environment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
