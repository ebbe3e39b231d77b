"""Benchmarks while training: a part of the questions, every so many steps, of the model as it stands."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from vlm.build import program_of
from vlm.data.stream import MicroBatch
from vlm.evaluation.evaluate import Bench
from vlm.models.base import BaseVlm
from vlm.models.program.attach import attach
from vlm.recipe import Recipe
from vlm.training.callbacks import append_line

LOG = "evaluations.jsonl"


def watchers_of(
    recipe: Recipe, model: BaseVlm, tokenizer: PreTrainedTokenizerBase
) -> Callable[[int, int], list[Callback]]:
    """What ``evaluate.during`` asks for, as callbacks of a stage with so many steps.

    Raises DataError or RecipeError as an evaluation does: what cannot be judged is refused before the first step.
    """
    during = recipe.evaluate.during
    if during is None:
        return lambda stage, steps: []
    labels = during.benchmarks or tuple(recipe.evaluate.benchmarks)
    benches = [Bench(recipe, label, model, tokenizer, None, during.limit) for label in labels]
    return lambda stage, steps: [During(recipe, stage, steps, benches)]


class During(Callback):
    """Writes a line of evaluations.jsonl after every ``every`` steps and after the last one of a stage.

    The recipe's own pruner, cache policy and mitigators act, at their final budget. It leaves no trace in what is
    learned: a step draws its random numbers from its place in the order, and modes and programs are put back. Ranks
    share the questions; where weights are sharded all ask the same, as they gather them together.
    """

    def __init__(self, recipe: Recipe, stage: int, steps: int, benches: list[Bench]) -> None:
        assert recipe.evaluate.during is not None
        self.every, self.stage, self.steps = recipe.evaluate.during.every, stage, steps
        self.name = recipe.stages[stage].name
        self.path = Path(recipe.run.dir) / LOG
        self.row, self.benches = recipe.own, benches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if not batch.last_in_window or (done % self.every and done != self.steps):
            return
        begun = time.perf_counter()
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.model.parameters())
        metrics = self._judge(pl_module, shared=not sharded)
        place = {"stage": self.stage, "name": self.name, "step": batch.step, "steps": self.steps}
        if trainer.is_global_zero:
            append_line(self.path, {**place, "seconds": time.perf_counter() - begun, "metrics": metrics})

    @torch.no_grad()
    def _judge(self, module: Any, shared: bool) -> dict[str, Any]:
        model, metrics = module.model, {}
        modes = [(part, part.training) for part in model.modules()]
        module.detach()  # the program of training; the next step attaches its own again
        model.eval()
        try:
            with attach(model, program_of(self.row, model.facts)):
                for bench in self.benches:
                    bench.ask.model = model  # where weights are sharded it is not the one that was built
                    metrics |= bench.named(bench.benchmark.score(bench.answer(lambda count: None, shared)))
        finally:
            for part, mode in modes:
                part.training = mode
        return metrics
