"""Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads (2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress_layers, received_by_entry
from vlm.models.program.kv import pooled, semantic_distance, some_heads_whole
from vlm.models.program.kv_budget import whole_heads, window_in
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts, Received, ValueStates


@dataclass(frozen=True)
class Taskkv:
    """The heads whose meaning lies farthest from the others' keep all; the others sinks, recent and middle entries.

    keep: entries of each head on average over the layer's, a share of the prompt or a number; fewer heads stay whole
    where it does not allow for more. share, least: key/value heads that stay whole, a share of them in the first layer
    and a number in the last (0.25 and 4 for Llama-2-7B, 0.3 and 1 for Mistral-7B). rows: last rows that observe. best:
    entries whose values make up a head's meaning. recent, sinks: last and first entries of the other heads; the recent
    ones take at most half the budget, the sinks at most half of what is left. kernel: middle entries are scored by
    their neighbourhood.
    """

    source: ClassVar[str] = "Task-KV (arXiv 2501.15113), section 3"
    verified: ClassVar[str] = "paper; ties and grouped heads: reconstruction"

    keep: Budget
    share: float = 0.25
    least: int = 1
    rows: int = 32
    best: int = 256
    sinks: int = 16
    recent: int = 256
    kernel: int = 5

    def program(self, facts: Facts) -> Program:
        needs = lambda layer: (Received(layer, self.rows, "each"), ValueStates(layer))  # noqa: E731
        return compress_layers(self.keep, needs, self._keep)

    def _keep(self, layers: Sequence[Entries]) -> list[Bool[Tensor, "batch kv_heads entries"]]:
        return [self._keep_layer(entries, len(layers)) for entries in layers]

    def _keep_layer(self, entries: Entries, layers: int) -> Bool[Tensor, "batch kv_heads entries"]:
        score, valid = received_by_entry(entries, self.rows), entries.valid
        distance = semantic_distance(score, entries.signal(ValueStates(entries.layer)), valid, self.best)
        kept = capacity(self.keep, entries)
        recent = window_in(kept, self.recent)
        sinks = window_in(kept - recent, self.sinks).minimum(kept - recent)
        whole = whole_heads(entries.layer, layers, entries.kv_heads, self.share, self.least)
        score = pooled(score, valid, self.kernel)
        return some_heads_whole(score, valid, distance, whole, kept * entries.kv_heads, sinks, recent)
