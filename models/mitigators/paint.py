"""PAINT: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Models (2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.patches import outliers, patch_scores, top_share
from vlm.models.program.program import Keys, Program
from vlm.models.program.rescore import from_second, raised, rescore
from vlm.models.program.signals import Facts, Given, patch_attention


@dataclass(frozen=True)
class Paint:
    """The newest token looks more at the patches that matter to the vision encoder, local ones most.

        z_j + alpha |z_j| at local tokens, z_j + beta |z_j| at summary tokens, before the softmax

    Summary tokens are those to which the class token pays outlying attention in block ``late``; local ones have the
    largest attention of the class token in block ``early`` and are no summary tokens. A second pass of the vision
    encoder reads both, so tokens that a pruner drops are simply not there to be raised.

    alpha, beta: 0 and 0 change nothing. local: share of an image's tokens. layers: of the language model, first and
    last; all but the first two without. attention: ``received`` takes what all tokens pay in place of the class token,
    for encoders without one. The head-wise modulation of the abstract is not in the code, nor here.
    """

    source: ClassVar[str] = "PAINT (arXiv 2501.12206), section 3 and official code"
    verified: ClassVar[str] = "code by specification, numbers not reproduced; encoders without class token: ours"

    alpha: float = 0.7
    beta: float = 0.3
    local: float = 0.25
    early: int = 0
    late: int = -2
    layers: tuple[int, int] | None = None
    attention: Literal["class", "received"] = "class"

    def program(self, facts: Facts) -> Program:
        if not 0 <= self.local <= 1:
            raise ModelError(f"paint.local: expected a share from 0 to 1; found {self.local:g}")
        layers = from_second(facts, "paint", self.layers)
        if self.alpha == self.beta == 0:
            return ()
        rows = [patch_attention(facts, "paint", block, self.attention) for block in (self.early, self.late)]
        gain = patch_scores(facts, "paint", rows, self.gains)
        return rescore(layers, lambda scores, keys: self.scores(gain, scores, keys), gain)

    def gains(self, attention: Sequence[Float[Tensor, "images tokens"]]) -> Float[Tensor, "images tokens"]:
        """By how much each token's score rises, from what the two blocks pay it."""
        early, late = attention
        summary = outliers(late)
        local = top_share(early, self.local) & ~summary
        return self.alpha * local.to(early.dtype) + self.beta * summary.to(early.dtype)

    def scores(
        self, gain: Given, scores: Float[Tensor, "batch heads keys"], keys: Keys
    ) -> Float[Tensor, "batch heads keys"]:
        return raised(scores, keys.grown(gain, lambda: keys.signal(gain)[:, None]))
