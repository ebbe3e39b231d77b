"""Numbers that ranks tell each other."""

import atexit
from collections.abc import Sequence

import torch
import torch.distributed as dist


def total(values: Sequence[float]) -> list[float]:
    """The sum over all ranks of each of these numbers, on every rank.

    They stay on the CPU where a backend takes them there (gloo beside NCCL), so that the GPU is not waited for.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    kinds = dist.distributed_c10d._get_default_group()._device_types
    device = "cpu" if torch.device("cpu") in kinds else f"cuda:{torch.cuda.current_device()}"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@atexit.register
def leave() -> None:
    """NCCL warns of a process group that a program ends with."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
