"""Accelerators by name: peak dense bfloat16 FLOPs and memory, as their makers' data sheets say (no sparsity)."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """name: in a recipe's command; peak: bf16 multiply-adds as two operations, per second; memory in GiB.

    words: all of them are in the name that the driver gives, lower case.
    """

    name: str
    peak: float
    memory: float
    words: tuple[str, ...]


GPUS = (
    Gpu("gb200", 2.5e15, 186, ("gb200",)),
    Gpu("b200", 2.25e15, 180, ("b200",)),
    Gpu("h200", 989e12, 141, ("h200",)),
    Gpu("h100-pcie", 756e12, 80, ("h100", "pcie")),
    Gpu("h100", 989e12, 80, ("h100",)),
    Gpu("h800", 989e12, 80, ("h800",)),
    Gpu("a100-40", 312e12, 40, ("a100", "40gb")),
    Gpu("a100", 312e12, 80, ("a100",)),
    Gpu("a800", 312e12, 80, ("a800",)),
    Gpu("l40s", 362e12, 48, ("l40s",)),
    Gpu("l4", 121e12, 24, ("nvidia l4",)),
    Gpu("a10g", 70e12, 24, ("a10g",)),
    Gpu("a10", 125e12, 24, ("a10",)),
    Gpu("a6000", 155e12, 48, ("rtx a6000",)),
    Gpu("rtx5090", 210e12, 32, ("rtx 5090",)),
    Gpu("rtx4090", 165e12, 24, ("rtx 4090",)),
    Gpu("rtx3090", 71e12, 24, ("rtx 3090",)),
    Gpu("mi300x", 1.307e15, 192, ("mi300x",)),
    Gpu("mi250x", 383e12, 128, ("mi250x",)),
)


def by_name(name: str) -> Gpu | None:
    return next((gpu for gpu in GPUS if gpu.name == name.lower()), None)


def by_driver(name: str) -> Gpu | None:
    """The accelerator that the driver calls ``name``; None for one that is not in the table."""
    return next((gpu for gpu in GPUS if all(word in name.lower() for word in gpu.words)), None)
