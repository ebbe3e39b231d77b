"""Sampling, with temperature, top-k and nucleus."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.search import Pick, Prompts, Search, drawn, draws, warped


@dataclass(frozen=True)
class Sample:
    """A token drawn from the model's distribution at every step.

    A prompt's draws go by ``seed``, its text and its pixels: not by the batch it is in, nor by the device.

    temperature: logits are divided by it (1 leaves them). top_k: only so many likeliest tokens. top_p: of these only
        the likeliest that together have this probability (1: all).
    """

    source: ClassVar[str] = "baseline; nucleus: The Curious Case of Neural Text Degeneration (ICLR 2020), section 3.1"
    verified: ClassVar[str] = "definition; distribution equal to Transformers' warpers"
    beams: ClassVar[bool] = False

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ModelError(f"sample.temperature: expected a number above 0; found {self.temperature:g}; use greedy")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"sample.top_p: expected a probability above 0 and up to 1; found {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"sample.top_k: expected at least 1 token; found {self.top_k}")

    def begin(self, prompts: Prompts) -> Search:
        numbers = draws(prompts, self.seed)

        def choose(logits: Float[Tensor, "rows vocab"], step: int) -> Int[Tensor, " rows"]:
            return drawn(warped(logits, self.temperature, self.top_k, self.top_p), numbers[:, step])

        return Pick(prompts, choose)
