"""PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress_layers, received_by_entry, shared_out
from vlm.models.program.kv import observed
from vlm.models.program.kv_budget import Window, pyramid
from vlm.models.program.program import Program
from vlm.models.program.quota import divide
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Pyramidkv:
    """SnapKV's choice with budgets that fall linearly from the first layer to the last.

    keep: entries of each head on average over layers, a share of the prompt or a number. slope: the last layer's share
    before the window is the mean divided by it. What the code's whole steps give beyond the mean is taken back, in
    proportion. window, kernel, pooling, heads: as of SnapKV.
    """

    source: ClassVar[str] = "PyramidKV (arXiv 2406.02069), section 4.2; official code"
    verified: ClassVar[str] = "code"

    keep: Budget
    slope: int = 20
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    heads: Literal["mean", "max"] = "mean"

    def program(self, facts: Facts) -> Program:
        rows = Window(self.window, self.keep)
        return compress_layers(self.keep, lambda layer: (Received(layer, rows, "each"),), self._keep)

    def _keep(self, layers: Sequence[Entries]) -> list[Bool[Tensor, "batch kv_heads entries"]]:
        rows = Window(self.window, self.keep)
        first = layers[0]  # without a cut, all layers have its length and its budget

        def falling(sample: int, total: int, room: Sequence[int]) -> list[int]:
            window, length = int(rows.of(first.prompt)[sample]), int(first.prompt[sample])
            mean = int(capacity(self.keep, first)[sample])
            wish = pyramid(mean, window, length, len(layers), self.slope)
            return divide(total, [n - window for n in wish], room)

        counts = shared_out(self.keep, self.window, layers, falling)
        return [
            observed(
                received_by_entry(entries, rows, self.heads),
                entries.valid,
                count,
                rows.of(entries.prompt),
                self.kernel,
                self.pooling,
            )
            for entries, count in zip(layers, counts, strict=True)
        ]
