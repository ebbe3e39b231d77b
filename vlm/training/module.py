"""The Lightning module: parts frozen or trained, one loss over the global batch, the program attached."""

import math
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from vlm.data.stream import MicroBatch
from vlm.models.base import BaseVlm
from vlm.models.lora import adapters
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.recipe.schema import KeepSchedule, Schedule, Stage
from vlm.training.auxiliary import added, noting
from vlm.training.errors import TrainingError
from vlm.training.loss import Loss
from vlm.training.memory import recompute_frozen
from vlm.training.ranks import gather, total
from vlm.training.sharding import Sharded, gathered, local
from vlm.training.zero import Zero

ASK_EVERY = 10  # steps


class TrainingModule(LightningModule):
    """One stage of training.

    The loss of a step is the sum over everything supervised in the global batch, divided by its total weight:
    the gradient does not depend on how the batch is split into ranks, accumulation and micro-batches.

    Args:
        objective: module that maps (model, batch) to a :class:`~vlm.training.loss.Loss`.
        per: ``"token"`` or ``"sample"``, what that loss is averaged over.
        pruner, mitigators: methods whose program is attached while training.
        keep_schedule: how the pruner's budget comes down during training.
        note: plain values that go into every checkpoint (recipe, versions, data hashes).
        seed: of dropout and whatever else is random in the model.
        leave_out: weights that the run never changes and that are not saved, because they come from elsewhere.
    """

    def __init__(
        self,
        model: BaseVlm,
        objective: nn.Module,
        per: str,
        stage: Stage,
        steps: int,
        global_batch: int,
        pruner: Any = None,
        mitigators: tuple[Any, ...] = (),
        keep_schedule: KeepSchedule | None = None,
        note: dict[str, Any] | None = None,
        seed: int = 0,
        leave_out: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.seed = seed
        self.model, self.objective, self.per = model, objective, per
        self.stage, self.steps, self.global_batch = stage, steps, global_batch
        self.pruner, self.mitigators, self.keep_schedule = pruner, mitigators, keep_schedule
        self.note = note or {}
        self.last: Loss | None = None  # of the micro-batch just done, for callbacks
        self.step, self.window_weight = 0, 0.0
        self.grad_norm = 0.0  # of the whole gradient of the last step, before clipping
        self.gradients: list[Tensor] = []  # of all parameters, from the check of a step to its clipping
        self.stop, self.told_to_stop = False, bool  # whether the ranks end after this step; this rank was told to
        self.counted = (0, 0)  # tokens of the micro-batch, without and with padding
        self.window: list[tuple[Tensor, list[str]]] = []  # loss and sample keys since the last optimizer step
        self._attached = ExitStack()
        self._methods: tuple[Any, ...] = ()
        self.leave_out = {f"model.{name}" for name in leave_out}
        self.strict_loading = not leave_out  # what is there is checked before Lightning loads it
        if "head" in stage.train and not any(True for _ in objective.parameters()):
            found = f"objective {stage.objective.use} has none"
            raise TrainingError(f"stage {stage.name}: train.head: expected an objective with a head; {found}")
        for role, part in model.parts.items():
            training = stage.train.get(role)  # type: ignore[call-overload]  # a role is one of the keys
            part.requires_grad_(training is not None and training.lora is None)
            for _, parameter in adapters(part):
                parameter.requires_grad_(training is not None and training.lora is not None)

    def configure_model(self) -> None:
        """Shard the weights where the strategy does; Lightning calls it when all ranks have met."""
        if isinstance(self.trainer.strategy, Sharded):
            self.trainer.strategy.shard(self)

    def forward(self, batch: Any) -> Loss:
        """The objective's loss of a batch, and what the vision encoder adds to it. Everything a step reads is read in
        here: what shards the module gathers its weights when it is called."""
        with noting(self.model) as terms:
            loss = self.objective(self.model, batch)
        return added(loss, terms, batch)

    def on_before_batch_transfer(self, batch: MicroBatch, dataloader_idx: int) -> MicroBatch:
        """Count where the batch still lies in the CPU's memory, so that no step waits for the GPU to tell a number."""
        self.counted = (batch.batch.token_count, batch.batch.tokens.numel())
        return batch

    def training_step(self, micro: MicroBatch, index: int) -> Tensor:
        accumulate = self.trainer.accumulate_grad_batches
        if index % accumulate == 0:
            self.window_weight = self._agree(micro)
        loss = self(micro.batch)
        self.last = loss
        self.window.append((loss.value.detach(), micro.batch.keys))
        self.step = micro.step
        # Lightning divides by the accumulation and DDP by the number of ranks; the window's weight is global.
        scale = accumulate * self.trainer.world_size / self.window_weight if self.window_weight else 0.0
        if isinstance(self.trainer.strategy, Zero):
            scale *= accumulate  # DeepSpeed divides by it once more
        # An infinite loss may have finite gradients; NaN ones tell every rank.
        return loss.value * torch.where(loss.value.detach().isfinite(), scale, torch.nan)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop at a gradient that is not finite, on all ranks at once and before it spoils the weights."""
        window, self.window = self.window, []
        if isinstance(self.trainer.strategy, Zero):  # which keeps gradients to itself: their loss tells, on all ranks
            broken_here = sum(not loss.isfinite() for loss, _ in window)
            norm = math.nan if total([float(broken_here)])[0] else 0.0
        else:
            self.gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = self.grad_norm = float(gathered(torch.nn.utils.get_total_norm(self.gradients)))
        if math.isfinite(norm):
            return
        broken = gather([key for loss, keys in window if not loss.isfinite() for key in keys])
        what = "loss" if any(broken) else "gradient"
        parts = broken if any(broken) else gather([key for _, keys in window for key in keys])
        keys = [key for part in parts for key in part]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise TrainingError(
            f"stage {self.stage.name}, step {self.step}: expected a finite {what}, found one that is not;"
            f" samples: {', '.join(keys[:8])}{more}"
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale all gradients to the norm ``clip`` at most, by the norm of the whole gradient, which is known already.

        The same number on every rank, so shards may be scaled one by one.
        """
        gradients, self.gradients = self.gradients, []
        if gradient_clip_val is not None and (share := gradient_clip_val / (self.grad_norm + 1e-6)) < 1:
            torch._foreach_mul_([local(gradient) for gradient in gradients], share)

    def _agree(self, micro: MicroBatch) -> float:
        """The weight of the whole global batch, over its micro-batches and all ranks; and whether to stop after it.

        Where the weight needs no asking, ranks ask each other to stop every tenth step only.
        """
        if self.per == "sample":
            if micro.step % ASK_EVERY == 0:
                self.stop = total([self.told_to_stop()])[0] > 0
            return float(self.global_batch)
        weight, told = total([micro.window_weight, self.told_to_stop()])
        self.stop = told > 0
        return weight

    def configure_optimizers(self) -> Any:
        groups = []
        for part, training in self.stage.train.items():
            own = [] if part == "head" else self.model.parts[part].parameters()
            parameters = [p for p in own if p.requires_grad]
            if part == ("head" if "head" in self.stage.train else next(iter(self.stage.train))):
                parameters += list(self.objective.parameters())
            # Norms and biases (one-dimensional) are not decayed.
            for decay, chosen in (
                (training.weight_decay, [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                if chosen:
                    groups.append({"params": chosen, "lr": training.lr, "weight_decay": decay, "name": part})
        optimizer = torch.optim.AdamW(groups, betas=self.stage.betas)
        course = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(self.stage.schedule, step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": course, "interval": "step"}}

    def on_train_start(self) -> None:
        self._train_only_trained_parts()

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        # From the place in the order alone, so that a resumed run draws what an uninterrupted one would.
        torch.manual_seed(int.from_bytes(sha256(repr((self.seed, batch.step, batch.slots)).encode()).digest()[:7]))
        methods = self._methods_at(batch.step)
        if methods != self._methods:
            self.detach()
            program = tuple(pair for method in methods for pair in method.program(self.model.facts))
            self._attached.enter_context(attach(self.model, program))
            self._methods = methods

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= self.note
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in self.leave_out}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches; those of the steps done are as many as this layout would have taken."""
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # It saw the checkpoint before the end of its last batch: one is not completed.
        counts = {"ready": done, "started": done, "processed": done, "completed": done - 1}
        progress |= {"total": dict(counts), "current": dict(counts)}

    def detach(self) -> None:
        """Take the program off the model; whoever ran the fit calls it, however the fit ended."""
        self._attached.close()
        self._methods = ()

    def _train_only_trained_parts(self) -> None:
        """Frozen parts run as in evaluation (no dropout, no batch statistics)."""
        self.model.train()
        for role, part in self.model.parts.items():
            part.train(role in self.stage.train)
        recompute_frozen(self.model.decoder)

    def _methods_at(self, step: int) -> tuple[Any, ...]:
        """The methods of a training step; a keep schedule lowers the kept share step by step."""
        pruner, schedule = self.pruner, self.keep_schedule
        if pruner is not None and schedule is not None and step < schedule.over * self.steps:
            keep: Budget = pruner.keep
            final = keep.ratio or 1.0
            if keep.tokens:
                assert self.model.most_visual_tokens is not None  # the plan refuses such a schedule
                final = keep.tokens / self.model.most_visual_tokens
            done = step / (schedule.over * self.steps)
            pruner = replace(pruner, keep=Budget(ratio=schedule.start + (final - schedule.start) * done))
        return tuple(method for method in (pruner, *self.mitigators) if method is not None)


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` of ``steps``."""
    warmup = schedule.warmup if isinstance(schedule.warmup, int) else round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    course = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule.use]
    return schedule.final + (1 - schedule.final) * course
