"""What ranks tell each other."""

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlm.training.errors import TrainingError
from vlm.training.strategy import backend

T = TypeVar("T")


def known() -> bool:
    """Whether there are ranks that know each other."""
    return dist.is_available() and dist.is_initialized()


def meet() -> None:
    """Make ranks that a launcher started known to each other, where no training has done it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and not known():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend())


def rank_and_world() -> tuple[int, int]:
    """The number of this rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if known() else (0, 1)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank."""
    if not known():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives on every rank, in rank order. Raises everywhere what it raises anywhere, so that no rank
    waits for one that has failed."""
    done, failure = None, None
    try:
        done = work()
    except Exception as error:
        failure = error
    found = gather((done, "" if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(found):
        if message:
            raise TrainingError(f"rank {rank}: {message}")
    return [part for part, _ in found]


def total(values: Sequence[float]) -> list[float]:
    """The sum over all ranks of each of these numbers, on every rank.

    They stay on the CPU where a backend takes them there (gloo beside NCCL), so that the GPU is not waited for.
    """
    if not known():
        return list(values)
    kinds = dist.distributed_c10d._get_default_group()._device_types
    device = "cpu" if torch.device("cpu") in kinds else f"cuda:{torch.cuda.current_device()}"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@atexit.register
def leave() -> None:
    """NCCL warns of a process group that a program ends with."""
    if known():
        dist.destroy_process_group()
