"""``run.parallel`` in one word: which of Lightning's engines runs a stage."""

from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from vlm.recipe.schema import Run
from vlm.training.sharding import Sharded
from vlm.training.zero import zero_strategy

SHARDED = ("fsdp2", "zero1", "zero2", "zero3")  # they take a model's parameters apart


def backend() -> str | None:
    """Tensors on a GPU go through NCCL; small ones on the CPU through gloo, so that no step waits for the GPU only to
    tell the ranks a number."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None


def environment() -> list[Any]:
    """Under SLURM Lightning would save and requeue by itself, into the working folder; the launcher decides that."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def strategy(run: Run) -> Any:
    """What Lightning's Trainer takes as its strategy. Raises TrainingError where this machine cannot do it."""
    if run.parallel == "ddp":
        return DDPStrategy(process_group_backend=backend())
    if run.parallel == "fsdp2":
        return Sharded(run.world, backend())
    if run.parallel != "single":
        return zero_strategy(run)
    return "auto"
