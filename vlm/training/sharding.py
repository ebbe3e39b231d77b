"""FSDP2 through Lightning: weights, gradients and optimizer in shards, checkpoints whole as those of any other run.

Three things differ from Lightning's own ModelParallelStrategy. Its mesh is all data parallel (Lightning's default is
tensor parallel on one node). A checkpoint is one file of plain whole tensors, the optimizer's state by number of
parameter, so that a run under DDP, on one device or on another number of shards goes on from it and the other way
round. And it goes through our own reading and writing (:class:`~vlm.training.checkpoints.Files`): no code in a
checkpoint runs, and a full disk is one line.

What is one unit of gathering: every decoder block, every block of a vision encoder that trains, and the rest in one,
which is gathered once per pass. A frozen encoder is in the rest: whether a rank has images or not, all ranks gather the
same units in the same order, so that none waits for another.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vlm.models.base import BaseVlm


class Sharded(ModelParallelStrategy):
    """FSDP2 over ``world`` devices, all of them data parallel."""

    def __init__(self, world: int, backend: str | None = None) -> None:
        super().__init__(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def shard(self, module: Any) -> None:
        """Shard a training module, in place; its weights are then on this rank's device."""
        mesh = self.device_mesh["data_parallel"]
        for block in units(module.model):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU of the first rank, of the weights that the module saves; nothing on the others."""
        module = self.lightning_module
        assert module is not None
        left_out = getattr(module, "leave_out", ())
        return self._whole({name: value for name, value in module.state_dict().items() if name not in left_out})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict` with whole tensors on the CPU of the first rank."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return {**state, "state": {key: self._whole(values) for key, values in state["state"].items()}}

    def _whole(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        whole = {}
        for name, value in tensors.items():
            full = gathered(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                whole[name] = full.cpu() if isinstance(full, Tensor) else full
        return whole

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank takes its own shards of the whole tensors; that they fit was checked before."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, value in checkpoint["state_dict"].items():
            own[name].copy_(as_shard(value, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {key: _like(value, parameters[number]) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, parameter: Tensor) -> Any:
    """A moment of the optimizer as its parameter is sharded; counters stay as they are."""
    return as_shard(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def units(model: BaseVlm) -> Iterator[nn.Module]:
    """The blocks that are gathered one at a time: the decoder's, and those of a vision encoder that trains."""
    yield from model.decoder.layers
    vision = model.parts["vision"]
    if any(parameter.requires_grad for parameter in vision.parameters()):
        yield from blocks_of([module for _, module in vision.named_modules()])


def blocks_of(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """Members of lists of equal modules (the blocks of a transformer), of the outermost lists only."""
    taken: set[int] = set()
    for module in modules:
        if id(module) in taken or not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        members = list(module)
        # What has no parts is a layer and no block; a list of lists is never called, so nothing would gather it.
        if len({type(member) for member in members}) > 1 or isinstance(members[0], nn.ModuleList):
            continue
        if not any(True for _ in members[0].children()) or not any(True for _ in members[0].parameters()):
            continue
        for member in members:
            taken.update(id(inner) for inner in member.modules())
            yield member


def as_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of ``whole`` as ``like`` is sharded, without a word to the other ranks."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded: called on all ranks, in the same order."""
    if hasattr(value, "ds_id"):  # DeepSpeed's stage 3 took it apart
        from deepspeed.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        with GatheredParameters([value]):
            return value.detach().clone()
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def working_copy(model: Any) -> Any:
    """The model with parameters of its own over the same memory, for a strategy that takes its parameters apart."""
    memo: dict[int, Any] = {id(model.tokenize): model.tokenize}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


@torch.no_grad()
def write_back(working: LightningModule | nn.Module, model: nn.Module) -> None:
    """Put what a working copy learned into the model it was made of. Called on all ranks."""
    into = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in (*working.named_parameters(), *working.named_buffers()):
        if value.requires_grad or not isinstance(value, nn.Parameter):
            into[name].data.copy_(gathered(value))
