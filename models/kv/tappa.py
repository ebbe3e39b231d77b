"""TAPPA: budgets of layers from the temporal similarity of their queries (ICLR 2026)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries
from vlm.models.program.compress import compress_layers, shared_out
from vlm.models.program.kv import group_heads, observed
from vlm.models.program.kv_budget import Window, preferred, window_statistics
from vlm.models.program.kv_signals import QuerySimilarity, ReceivedSquares
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts, Received, Signal

SMALLEST = 1e-6  # preference of a layer whose queries do not move at all


@dataclass(frozen=True)
class Tappa:
    """Layers whose queries move more get more entries; heads keep what the last rows attend to and vary in.

    keep: entries of each head on average over layers, a share of the prompt or a number. rows: last queries that are
    compared. variance: weight of the variance over the window's rows in an entry's score, after CAKE; 0 is SnapKV's
    score. window (at most half the budget), kernel: as of SnapKV.
    """

    source: ClassVar[str] = "TAPPA (ICLR 2026), sections 4 and 5.1; official code"
    verified: ClassVar[str] = "golden similarity; budgets and scores from code"

    keep: Budget
    rows: int = 32
    variance: float = 200.0
    window: int = 32
    kernel: int = 5

    def program(self, facts: Facts) -> Program:
        return compress_layers(self.keep, self._needs, self._keep)

    def _needs(self, layer: int) -> tuple[Signal, ...]:
        window = Window(self.window, self.keep)
        needs = (QuerySimilarity(layer, self.rows), Received(layer, window, "each"))
        return (*needs, ReceivedSquares(layer, window)) if self.variance else needs

    def _keep(self, layers: Sequence[Entries]) -> list[Bool[Tensor, "batch kv_heads entries"]]:
        similarity = [e.signal(QuerySimilarity(e.layer, self.rows)).tolist() for e in layers]

        def by_movement(sample: int, total: int, room: Sequence[int]) -> list[int]:
            return preferred([max(1 - own[sample], SMALLEST) for own in similarity], total, room)

        rows = Window(self.window, self.keep)
        counts = shared_out(self.keep, self.window, layers, by_movement)
        return [
            observed(self._score(entries), entries.valid, count, rows.of(entries.prompt), self.kernel)
            for entries, count in zip(layers, counts, strict=True)
        ]

    def _score(self, entries: Entries) -> Float[Tensor, "batch kv_heads entries"]:
        rows = Window(self.window, self.keep)
        score = entries.signal(Received(entries.layer, rows, "each"))
        if self.variance:
            squares = entries.signal(ReceivedSquares(entries.layer, rows))
            score = window_statistics(score, squares, rows.of(entries.prompt), self.variance)
        return group_heads(score, entries.kv_heads)
