"""SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress, received_by_entry
from vlm.models.program.kv import observed
from vlm.models.program.kv_budget import Window
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Snapkv:
    """Each head keeps the entries that the last rows of the prompt attend to most, and those rows.

    keep: entries of each head, a share of the prompt or a number. window: rows that observe and stay; at most half the
    budget. kernel, pooling: scores are smoothed over neighbours (``mean`` of 5 is the code's default, ``max`` of 7 its
    LongBench setting). heads: how query heads share a key/value head (the code keeps a cache for each query head
    instead).
    """

    source: ClassVar[str] = "SnapKV (NeurIPS 2024), section 4; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    heads: Literal["mean", "max"] = "mean"

    def program(self, facts: Facts) -> Program:
        rows = Window(self.window, self.keep)
        return compress(self.keep, lambda layer: (Received(layer, rows, "each"),), self._keep)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        rows = Window(self.window, self.keep)
        score = received_by_entry(entries, rows, self.heads)
        kept = capacity(self.keep, entries)
        return observed(score, entries.valid, kept, rows.of(entries.prompt), self.kernel, self.pooling)
