"""A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (EMNLP 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress
from vlm.models.program.kv import top_entries
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts, KeyStates


@dataclass(frozen=True)
class L2norm:
    """Each head keeps the entries whose keys have the smallest norm; no attention is read.

    keep: entries of each head, a share of the prompt or a number. skip: first layers that stay whole, beyond the budget
    (the paper skips two; none here, so that the budget holds).
    """

    source: ClassVar[str] = "L2-norm KV compression (EMNLP 2024), section 3"
    verified: ClassVar[str] = "port"

    keep: Budget
    skip: int = 0

    def program(self, facts: Facts) -> Program:
        return compress(self.keep, lambda layer: (KeyStates(layer),), self._keep)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        if entries.layer < self.skip:
            return entries.held.valid
        norm = entries.signal(KeyStates(entries.layer)).norm(dim=3)
        return top_entries(-norm, entries.valid, capacity(self.keep, entries))
