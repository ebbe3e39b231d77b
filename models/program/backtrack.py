"""A decode controller that goes back where a probe sees a made-up token coming.

Source: TruthPrInt (ICCV 2025), section 3.3, without released code.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.models.program.contrast import keep_only, wide
from vlm.models.program.control import Decode
from vlm.models.program.probe import Probe
from vlm.models.program.search import Move


class Said(NamedTuple):
    """A token of the answer, and the largest probability that there was when it was chosen."""

    token: int
    confidence: float


class Backtrack:
    """Before each token the probe reads the state that predicts it. Above the threshold the decode goes back to the
    token of the sentence that was chosen with the least confidence and takes another one, none that was tried there.

    ends: tokens that end a sentence. retries: of one sentence; after these what comes is accepted, as it is where a
    sentence has just begun.
    """

    def __init__(self, decode: Decode, probe: Probe, threshold: float, ends: Collection[int], retries: int) -> None:
        self.decode, self.threshold, self.ends, self.retries = decode, threshold, frozenset(ends), retries
        self.probe = probe.to(decode.layout.role.device)
        self.state: tuple[Said, ...] = ()
        self._tried: dict[int, list[int]] = {}  # tokens that were taken back, by the length they were chosen at
        self._used: dict[int, int] = {}  # retries, by the length at which the sentence begins
        self._surest = 0.0

    def score(self, scores: Float[Tensor, "rows vocab"]) -> tuple[Float[Tensor, "rows vocab"], int | None]:
        length = self.decode.length
        begin = next((n for n in range(length, 0, -1) if self.state[n - 1].token in self.ends), 0)
        if begin < length and self._used.get(begin, 0) < self.retries and self._made_up():
            back = min(range(begin, length), key=lambda place: self.state[place].confidence)
            self._used[begin] = self._used.get(begin, 0) + 1
            self._tried = {place: tokens for place, tokens in self._tried.items() if place <= back}
            self._tried.setdefault(back, []).append(self.state[back].token)
            return scores, back
        self._surest = float(wide(scores).softmax(-1).max())
        tried = torch.zeros_like(scores, dtype=torch.bool)
        tried[:, self._tried.get(length, [])] = True
        return keep_only(scores, ~tried), None

    def moved(self, move: Move) -> None:
        self.state = (*self.state, Said(int(move.tokens[0]), self._surest))

    def _made_up(self) -> bool:
        states: Any = self.decode.inner(self.probe.layer)
        return float(self.probe.score(states)[0]) > self.threshold
