"""GIFT: Capturing Gaze Shifts for Guidance (ICML 2026)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.gaze import follow, gaze_shifts
from vlm.models.program.program import Keys, Program, Rescore, attn
from vlm.models.program.rescore import share
from vlm.models.program.signals import Facts, Given


@dataclass(frozen=True)
class Gift:
    """The newest token looks where the question's content words newly looked, and more at the question with it.

    In a pass before the answer each content word's attention to the image, less the attention of the word before it,
    gives a heat from 0 to 1 for each visual token. Then the half of the heads that look most at the image multiply its
    weights by ``exp(strength heat)``, the half that look most at the question multiply its weights by what the image
    gained, and rows sum to one again. Content words are all but a list of stop words and punctuation: ours, the paper
    tags parts of speech. A question without any changes nothing.

    strength: 0 changes nothing; 5 is for LLaVA-1.5, 4 for Qwen2-VL-7B. look: layers whose attention is read; without,
        the one that lies where 11 lies in the 32 of LLaVA-1.5-7B. layers: first and last that are changed, counted from
        0; without, those that lie where 12 to 22 lie.
    """

    source: ClassVar[str] = "GIFT (ICML 2026), section 3 and official code"
    verified: ClassVar[str] = "code by specification, numbers not reproduced; stop words, other depths: ours"

    strength: float = 5.0
    look: tuple[int, ...] | None = None
    layers: tuple[int, int] | None = None

    def program(self, facts: Facts) -> Program:
        layers = share(facts, "gift", self.layers, 12, 22)
        look = tuple(share(facts, "gift", None, 11, 11)) if self.look is None else self.look
        if wrong := [layer for layer in look if not 0 <= layer < facts.layers] or ([] if look else ["none"]):
            raise ModelError(f"gift.look: expected layers of 0..{facts.layers - 1}; found {wrong[0]}")
        if self.strength == 0:
            return ()
        if facts.decode is None:
            raise ModelError("gift: it tells content words by the tokenizer; found a model that comes without one")
        decode = facts.decode

        def scores(model: Any, inputs: Any, weights: Tensor | None) -> Float[Tensor, "batch visual"]:
            return gaze_shifts(model, inputs, look, decode)

        heat = Given(scores=scores, observes=True)
        return tuple((attn(layer), Rescore(weights=partial(self._follow, heat), needs=(heat,))) for layer in layers)

    def _follow(
        self, heat: Given, weights: Float[Tensor, "batch heads keys"], keys: Keys
    ) -> Float[Tensor, "batch heads keys"]:
        salience = keys.grown((self.strength, heat), lambda: (self.strength * keys.signal(heat)).exp())
        return follow(weights, salience, keys.visual, keys.question)
