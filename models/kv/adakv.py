"""Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress, received_by_entry
from vlm.models.program.kv import pooled, recent, top_entries
from vlm.models.program.kv_budget import Window, head_counts
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Adakv:
    """SnapKV's choice with the budget of a layer divided among its heads by what their best entries get.

    keep: entries of each head on average over the layer's, a share of the prompt or a number. floor: share of the
    budget that every head gets. normalise: weigh a head's scores by the mass that its best entries hold. window,
    kernel, pooling, heads: as of SnapKV.
    """

    source: ClassVar[str] = "AdaKV (arXiv 2407.11550), section 3; normalisation and defaults read in a port"
    verified: ClassVar[str] = "port"

    keep: Budget
    floor: float = 0.2
    normalise: bool = True
    window: int = 32
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"
    heads: Literal["mean", "max"] = "mean"

    def program(self, facts: Facts) -> Program:
        rows = Window(self.window, self.keep)
        return compress(self.keep, lambda layer: (Received(layer, rows, "each"),), self._keep)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        rows = Window(self.window, self.keep)
        window = rows.of(entries.prompt)
        last = recent(entries.valid, window)
        before = entries.valid & ~last
        score = pooled(received_by_entry(entries, rows, self.heads), before, self.kernel, self.pooling)
        base = capacity(self.keep, entries) - window
        counts = head_counts(score, before, base, self.floor, self.normalise)
        return top_entries(score, before, counts) | last[:, None]
