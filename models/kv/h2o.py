"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (NeurIPS 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, EvictStep, Row, standing, stay
from vlm.models.program.compress import compress, received_by_entry
from vlm.models.program.kv import group_heads, lightest, observed, recent
from vlm.models.program.kv_budget import window_in
from vlm.models.program.program import KV_DECODE, Program
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class H2o:
    """Each head keeps the entries that all rows so far attended to most, and the most recent ones.

    keep: entries of each head, a share of the prompt or a number. window: recent entries, at most half the budget and
    exactly that if not given, as in the paper (32 in KVCache-Factory). steps: also while decoding, as in the paper:
    each new row is added to the sums and the lightest entry that is not recent goes. Without, only the prompt is
    compressed (KVCache-Factory's form) and the cache grows again. Query heads that share a key/value head count alike.
    """

    source: ClassVar[str] = "H2O (NeurIPS 2023), section 4; prompt form as in KVCache-Factory"
    verified: ClassVar[str] = "port"

    keep: Budget
    window: int | None = None
    steps: bool = True

    def program(self, facts: Facts) -> Program:
        prompt = compress(self.keep, lambda layer: (Received(layer, "all", "each"),), self._keep)
        return (*prompt, (KV_DECODE, EvictStep(self._keep_step, self._add))) if prompt and self.steps else prompt

    def _window(self, entries: Entries) -> Int[Tensor, " batch"]:
        count = standing(self.keep, entries)
        return window_in(count, int(count.max()) if self.window is None else self.window)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        score = received_by_entry(entries, "all")
        kept = observed(score, entries.valid, standing(self.keep, entries), self._window(entries), kernel=1)
        if self.steps:
            entries.memory["score"] = stay(score, entries, kept)
        return kept

    def _add(self, entries: Entries, row: Row) -> None:
        before = torch.nn.functional.pad(entries.memory["score"], (0, 1))
        entries.memory["score"] = before + group_heads(row.attention(), entries.kv_heads)

    def _keep_step(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"] | None:
        over = entries.valid.sum(1) > standing(self.keep, entries)
        if not bool(over.any()):
            return None
        old = entries.valid & ~recent(entries.valid, self._window(entries)) & over[:, None]
        score = entries.memory["score"]
        kept = entries.held.valid & ~lightest(score, old[:, None].expand_as(score))
        entries.memory["score"] = stay(score, entries, kept)
        return kept
