"""DeepSpeed's ZeRO through Lightning, by a configuration that is made here: stages 1 to 3 on GPUs.

Lightning runs DeepSpeed on CUDA alone. What a CPU can check is checked in the tests (the configuration against
DeepSpeed's own rules, refusals); what a GPU must run is in ``tools/gpu``, and no GPU has run it yet.

A checkpoint holds whole weights, like any other of ours, and not DeepSpeed's optimizer, which lies in flat pieces of
one world size. So a run goes on from the end of a stage, and to resume within one is refused. ``fsdp2`` shards as much
as stage 3 and resumes exactly.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from vlm.recipe.schema import Run
from vlm.training.errors import TrainingError
from vlm.training.sharding import gathered


def zero_config(run: Run) -> dict[str, Any]:
    """DeepSpeed's configuration: the stage, and nothing that would change what is learned.

    Accumulation, clipping and micro-batch come from Lightning's trainer. Mixed precision is autocast over weights in
    float32, as in every other strategy; gradients are reduced in float32.
    """
    stage = int(run.parallel.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:  # layers are gathered by need; small weights (norms, biases) stay whole
        zero |= {"stage3_param_persistence_threshold": 100_000, "stage3_gather_16bit_weights_on_model_save": False}
    return {
        "train_micro_batch_size_per_gpu": run.micro_batch or 1,  # only told: batches are ours
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def check_zero(run: Run) -> None:
    """Raises TrainingError where this machine cannot run ZeRO, in one line with what can."""
    if not run.parallel.startswith("zero"):
        return
    if not torch.cuda.is_available():
        raise TrainingError(
            f"run.parallel: {run.parallel} needs CUDA GPUs, which Lightning's DeepSpeed runs on alone; found none: use "
            "fsdp2, which shards as much and runs on CPUs too"
        )
    if find_spec("deepspeed") is None:
        raise TrainingError(
            f"run.parallel: {run.parallel} needs DeepSpeed, which is not installed; pip install 'vlm-recipes[cluster]'"
        )


class Zero(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with our checkpoints."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU of the first rank."""
        module = self.lightning_module
        assert module is not None
        left_out, whole = getattr(module, "leave_out", ()), {}
        own: dict[str, Any] = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        for name in module.state_dict():
            if name not in left_out:
                full = gathered(own[name])
                if self.is_global_zero:
                    whole[name] = full.cpu()
        return whole

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Mapping[str, Any]:  # type: ignore[override]
        raise TrainingError(
            f"run.parallel: a stage cannot be resumed within under ZeRO, whose optimizer is not in {checkpoint_path}; "
            "use fsdp2, or run.resume=never"
        )


def zero_strategy(run: Run) -> Zero:
    """Raises TrainingError where it cannot run."""
    check_zero(run)
    return Zero(config=zero_config(run))
