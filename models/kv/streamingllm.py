"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, EvictStep, standing
from vlm.models.program.compress import compress
from vlm.models.program.kv import first_and_recent
from vlm.models.program.kv_budget import window_in
from vlm.models.program.program import KV_DECODE, Program
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Streamingllm:
    """Every head keeps the first few entries (attention sinks) and the most recent ones, whatever they are.

    keep: entries of each head, a share of the prompt or a number. sinks: first entries, at most half the budget. steps:
    also while decoding, as in the paper; without, only the prompt is compressed. The paper counts positions anew inside
    the cache; here, as in KVCache-Factory, entries keep theirs, so it is no way beyond the model's longest context.
    """

    source: ClassVar[str] = "StreamingLLM (ICLR 2024), section 3.2; positions as in KVCache-Factory"
    verified: ClassVar[str] = "port"

    keep: Budget
    sinks: int = 4
    steps: bool = True

    def program(self, facts: Facts) -> Program:
        prompt = compress(self.keep, lambda layer: (), self._keep)
        return (*prompt, (KV_DECODE, EvictStep(self._keep))) if prompt and self.steps else prompt

    def _keep(self, entries: Entries) -> Bool[Tensor, "batch kv_heads entries"]:
        count = standing(self.keep, entries)
        sinks = window_in(count, self.sinks).minimum(count - 1)
        kept = first_and_recent(entries.valid, sinks, count - sinks)
        return kept[:, None].expand(-1, entries.kv_heads, -1)
