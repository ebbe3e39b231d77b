"""Recycled Attention, RefreshKV: Updating Small KV Cache During Long-form Generation (ACL 2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, ReadStep, Row, standing
from vlm.models.program.compress import check_keep, received_by_entry
from vlm.models.program.kv import group_heads, lightest
from vlm.models.program.kv_steps import is_full_step, query_moved, recycled
from vlm.models.program.program import KV_DECODE, Program
from vlm.models.program.signals import Facts, LastQueries, Received, Signal


@dataclass(frozen=True)
class Recycled:
    """Steps read the entries that the last full step attended to most and what came since; some steps read all.

    keep: entries of each head that a step reads besides its own, a share of the prompt or a number; a new entry takes
    the place of the one attended to least. refresh: full steps come ``every`` so many tokens (50 on RULER, 10 for
    language modelling), or, with ``query``, wherever a layer's query, looked at every ``check`` steps, is less like the
    one of the last full step than ``least`` (mean cosine of heads). Nothing is evicted, so memory stays as it is. How
    query heads share a key/value head is not told there: the largest counts.
    """

    source: ClassVar[str] = "Recycled Attention / RefreshKV (ACL 2025), section 3"
    verified: ClassVar[str] = "abstract and a secondary note; grouped heads: reconstruction"

    keep: Budget
    refresh: Literal["stride", "query"] = "stride"
    every: int = 50
    check: int = 5
    least: float = 0.8

    def program(self, facts: Facts) -> Program:
        check_keep(self.keep)
        step = ReadStep(self._read, self._seen, self._start, self._needs)
        return () if self.keep.everything else ((KV_DECODE, step),)

    def _needs(self, layer: int) -> tuple[Signal, ...]:
        return Received(layer, "last", "each"), LastQueries(layer)

    def _start(self, entries: Entries) -> None:
        paid = received_by_entry(entries, "last", "max")
        entries.memory["set"] = recycled(paid, entries.valid, standing(self.keep, entries))
        entries.memory["query"] = entries.signal(LastQueries(entries.layer))[:, :, 0]

    def _full(self, entries: Entries, query: Float[Tensor, "batch heads dim"]) -> Bool[Tensor, " batch"]:
        """The rows that read everything at this step."""
        if self.refresh == "stride":
            whole = is_full_step(entries.step, self.every)
            return torch.full((len(query),), whole, device=query.device)
        looks = is_full_step(entries.step, self.check)
        return query_moved(query, entries.memory["query"], self.least) & looks

    def _read(
        self, entries: Entries, query: Float[Tensor, "batch heads dim"]
    ) -> Bool[Tensor, "batch kv_heads entries"]:
        memory = entries.memory
        memory["full"] = self._full(entries, query)
        memory["set"] = torch.nn.functional.pad(memory["set"], (0, 1), value=True)
        return memory["set"] | memory["full"][:, None, None]

    def _seen(self, entries: Entries, row: Row) -> None:
        memory, count = entries.memory, standing(self.keep, entries)
        paid = group_heads(row.attention(), entries.kv_heads, "max")
        full = memory["full"][:, None, None]
        older = torch.nn.functional.pad(memory["set"][..., :-1], (0, 1))
        over = (memory["set"].sum(2) > count[:, None])[..., None]
        in_between = memory["set"] & ~lightest(paid, older & over)
        memory["set"] = torch.where(full, recycled(paid, entries.valid, count), in_between)
        memory["query"] = torch.where(full, row.query, memory["query"])
