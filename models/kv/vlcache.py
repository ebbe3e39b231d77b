"""VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model Inference (2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, capacity
from vlm.models.program.compress import compress_layers, received_by_entry
from vlm.models.program.kv import with_recent_share
from vlm.models.program.kv_budget import shares_by_density
from vlm.models.program.kv_signals import Density
from vlm.models.program.program import Program
from vlm.models.program.quota import divide
from vlm.models.program.signals import Facts, Received


@dataclass(frozen=True)
class Vlcache:
    """Each head keeps what the text after the image attends to most; layers that look at more entries keep more.

    keep: entries of each head on average over layers, a share of the prompt or a number; a layer at its limit of the
    whole prompt leaves the rest unused, as in the port. window: share of a layer's entries that are its last ones.
    least: an entry counts as looked at from this share of its row's largest attention on.
    """

    source: ClassVar[str] = "VL-Cache (arXiv 2410.23317), section 4; read in a port (EffiVLM-Bench)"
    verified: ClassVar[str] = "port"

    keep: Budget
    window: float = 0.1
    least: float = 0.01

    def program(self, facts: Facts) -> Program:
        needs = lambda layer: (Received(layer, "text", "each"), Density(layer, self.least))  # noqa: E731
        return compress_layers(self.keep, needs, self._keep)

    def _keep(self, layers: Sequence[Entries]) -> list[Bool[Tensor, "batch kv_heads entries"]]:
        return [
            with_recent_share(received_by_entry(entries, "text"), entries.valid, count, self.window)
            for entries, count in zip(layers, self._counts(layers), strict=True)
        ]

    def _counts(self, layers: Sequence[Entries]) -> list[Int[Tensor, " batch"]]:
        density = torch.stack([e.signal(Density(e.layer, self.least)) for e in layers], 1).tolist()  # [B][layers]
        length = torch.stack([e.prompt for e in layers], 1).tolist()
        budget = torch.stack([capacity(self.keep, e) for e in layers], 1).tolist()
        counts = []
        for own, n, kept in zip(density, length, budget, strict=True):
            if kept == n:
                counts.append(n)
                continue
            shares = shares_by_density(own, sum(kept) / sum(n))
            wish = [max(int(share * m), 1) for share, m in zip(shares, n, strict=True)]
            counts.append(divide(sum(kept), wish, wish))  # never more than the budget
        return list(layers[0].prompt.new_tensor(counts).unbind(1))
