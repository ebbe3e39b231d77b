"""How a cache policy becomes a program: each layer for itself, or all layers with one budget."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, Evict, Needs, capacity
from vlm.models.program.kv import group_heads
from vlm.models.program.kv_budget import Window
from vlm.models.program.program import KV_PREFILL, Program
from vlm.models.program.signals import Received, Rows

Marks = Bool[Tensor, "batch kv_heads entries"]


def check_keep(keep: Budget) -> None:
    """Refuse a budget in another meaning than entries of each head. Raises ModelError."""
    if keep.meaning != "final":
        raise ModelError(f"kv.keep: expected a share of the prompt or a number of entries for each head; found {keep}")


def compress(keep: Budget, needs: Needs, choose: Callable[[Entries], Marks]) -> Program:
    """After the prompt each layer keeps what ``choose`` marks; empty when everything is kept."""
    return compress_layers(keep, needs, lambda layers: [choose(entries) for entries in layers])


def compress_layers(keep: Budget, needs: Needs, choose: Callable[[Sequence[Entries]], Sequence[Marks]]) -> Program:
    """:func:`compress` for a policy whose layers share their budgets."""
    check_keep(keep)
    return () if keep.everything else ((KV_PREFILL, Evict(needs, choose)),)


def received_by_entry(
    entries: Entries, rows: Rows, how: Literal["mean", "max"] = "mean"
) -> Float[Tensor, "batch kv_heads entries"]:
    """What each entry gets from some rows of the prompt, for each key/value head: ``how`` over its query heads."""
    return group_heads(entries.signal(Received(entries.layer, rows, "each")), entries.kv_heads, how)


def shared_out(
    keep: Budget,
    window: int,
    layers: Sequence[Entries],
    divide: Callable[[int, int, Sequence[int]], Sequence[int]],
) -> list[Int[Tensor, " batch"]]:
    """Entries of each layer when all layers share their budgets; each keeps its window.

    ``divide(sample, total, room)`` says how many of ``total`` entries before the windows each layer gets, none more
    than its ``room``. A cut inside the language model leaves later layers shorter prompts, budgets and rooms.
    """
    rows = torch.stack([Window(window, keep).of(entries.prompt) for entries in layers], 1)  # [B, layers]
    room = torch.stack([entries.prompt for entries in layers], 1) - rows
    total = torch.stack([capacity(keep, entries) for entries in layers], 1).sum(1) - rows.sum(1)
    each = [divide(n, *one) for n, one in enumerate(zip(total.tolist(), room.tolist(), strict=True))]
    return list((rows + rows.new_tensor(each)).unbind(1))
