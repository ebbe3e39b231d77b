"""SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, Evict, capacity
from vlm.models.program.kv import group_heads, observed
from vlm.models.program.program import KV_PREFILL, Program
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Snapkv:
    """Each head keeps the entries that the last rows of the prompt attend to most, and those rows.

    keep: entries of each head, a share of the prompt or a number. window: rows that observe; fewer where the budget is
    smaller than two windows. kernel, pooling: scores are smoothed over neighbours (``mean`` of 5 is the code's default,
    ``max`` of 7 its LongBench setting). heads: how query heads share a key/value head (the code keeps a cache for each
    query head instead).
    """

    source: ClassVar[str] = "SnapKV (NeurIPS 2024), section 4; official code"
    verified: ClassVar[str] = "golden"

    keep: Budget
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    heads: Literal["mean", "max"] = "mean"

    def program(self, facts: Facts) -> Program:
        if self.keep.everything:
            return ()

        def keep(layers: Sequence[Entries]) -> list[Bool[Tensor, "batch kv_heads entries"]]:
            return [self._keep(entries) for entries in layers]

        return ((KV_PREFILL, Evict(lambda layer: (Received(layer, self.window, "each"),), keep)),)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        score = group_heads(entries.signal(Received(entries.layer, self.window, "each")), entries.kv_heads, self.heads)
        kept = capacity(self.keep, entries)
        return observed(score, entries.layout.valid, kept, self.window, self.kernel, self.pooling)
