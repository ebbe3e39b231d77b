"""GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness (2025)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress, received_by_entry
from vlm.models.program.kv import hidden_strength, observed, outside_span, pooled, recent, without_repeats
from vlm.models.program.kv_budget import Window
from vlm.models.program.kv_signals import InputNorm
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts, KeyStates, Received


@dataclass(frozen=True)
class Guikv:
    """SnapKV's score with a bonus for strong tokens of the latest image, and none for what older images say again.

    keep: entries of each head, a share of the prompt or a number. strength, temperature: of the bonus, a softmax over
    the latest image of the standardised norm of the layer's input (the values of the published scripts; 0: no bonus).
    rank: keys of the latest image that span what it says; older entries with the smallest rest get no score. window (at
    most half the budget; the code allows all but two of it), kernel, heads: as of SnapKV.
    """

    source: ClassVar[str] = "GUI-KV (arXiv 2510.00536), section 3; official code read"
    verified: ClassVar[str] = "code"

    keep: Budget
    strength: float = 2.0
    temperature: float = 3.5
    rank: int = 32
    window: int = 8
    kernel: int = 5
    heads: Literal["mean", "max"] = "mean"

    def program(self, facts: Facts) -> Program:
        rows = Window(self.window, self.keep)
        needs = lambda layer: (Received(layer, rows, "each"), InputNorm(layer), KeyStates(layer))  # noqa: E731
        return compress(self.keep, needs, self._keep)

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        rows, layout, kept = Window(self.window, self.keep), entries.layout, capacity(self.keep, entries)
        window = rows.of(entries.prompt)
        latest = layout.visual & (layout.image == layout.image.amax(1, keepdim=True))
        before = entries.valid & ~recent(entries.valid, window)
        score = pooled(received_by_entry(entries, rows, self.heads), before, self.kernel)
        norm = entries.signal(InputNorm(entries.layer))
        score = score + hidden_strength(norm, latest, self.strength, self.temperature)[:, None]
        residual = outside_span(entries.signal(KeyStates(entries.layer)), latest, self.rank)
        share = 1 - kept.double() / entries.prompt
        score = without_repeats(score, residual, layout.visual & ~latest, share)
        return observed(score, entries.valid, kept, window, kernel=1)
