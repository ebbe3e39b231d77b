"""Keep random cache entries: the baseline that every cache policy must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress
from vlm.models.program.kv import recent, top_entries
from vlm.models.program.kv_budget import window_in
from vlm.models.program.program import Program
from vlm.models.program.select import random_scores
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Random:
    """Each head keeps the last entries of the prompt and a random subset of its own of the others.

    keep: entries of each head, a share of the prompt or a number. window: last entries, at most half the budget, as the
    policies that it is compared with keep them (0: none). The choice depends on ``seed`` and the sample's pixels, not
    on the batch.
    """

    source: ClassVar[str] = "baseline"
    verified: ClassVar[str] = "definition"

    keep: Budget
    window: int = 32
    seed: int = 0

    def program(self, facts: Facts) -> Program:
        return compress(self.keep, lambda layer: (), self._keep)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        count, heads, valid = capacity(self.keep, entries), entries.kv_heads, entries.valid
        stream = entries.layer * heads + torch.arange(heads, device=valid.device)
        seeds = entries.seed()[:, None] * 8191 + stream  # [B,KV]
        each = random_scores(valid.repeat_interleave(heads, 0), seeds.flatten(), self.seed)
        last = recent(valid, window_in(count, self.window))
        return top_entries(each.unflatten(0, (-1, heads)), valid & ~last, count - last.sum(1)) | last[:, None]
