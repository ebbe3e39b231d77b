"""VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models (TMLR 2026)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import VIT_OUT, Position, Program, Select, Selector, Tokens, cut, llm_before
from vlm.models.program.reduce import Reduced, average_into_nearest
from vlm.models.program.schedule import staged
from vlm.models.program.select import Ranking, top_by, windows_and_rest, windows_of
from vlm.models.program.signals import Facts, Received, encoder_of, patch_attention


@dataclass(frozen=True)
class Vscan:
    """Patches by early attention in windows and late attention overall, the others averaged in; then a second cut.

    Half of the patches are the best of each window in an early block, half the best of all others in the block of the
    features. The second cut, inside the language model, ranks tokens by what its layer would attend to from the last
    row; three times the budget reaches it (96 of 64 on average: 96, then 32).

    language: the second cut; without it the first one keeps the budget. layer: of the second cut, half the decoder by
    default (16 of 32). early: block of the windows, 5 of 24 by default. window: its side in patches. local: share of
    the windows. attention: ``received`` ranks patches by what all tokens pay them, for encoders without a class token
    (the authors' form for Qwen2.5-VL). Dropped patches are averaged into kept ones before the connector (code: behind
    it). debias: of the second cut, as for FastV; debias_encoder: of both rankings of the first one.
    """

    source: ClassVar[str] = "VScan (TMLR 2026), sections 3.1 and 3.2; official code"
    verified: ClassVar[str] = "golden windows; the rest from code"

    keep: Budget
    language: bool = True
    layer: int | None = None
    early: int | None = None
    window: int = 6
    local: float = 0.5
    attention: Literal["class", "received"] = "class"
    position: Position = "reindex"
    debias: Debias | None = None
    debias_encoder: Debias | None = None

    def program(self, facts: Facts) -> Program:
        early = encoder_of(facts, "vscan").depth * 5 // 24 if self.early is None else self.early
        signals = [patch_attention(facts, "vscan", layer, self.attention) for layer in (early, None)]
        in_windows, in_all = (Ranking.of(signal, self.debias_encoder) for signal in signals)

        def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
            near, overall = in_windows.score(tokens), in_all.score(tokens)
            windows = windows_of(tokens.row, tokens.col, self.window)
            return windows_and_rest(near, overall, tokens.valid, windows, count, self.local)

        def reduce(tokens: Tokens, kept: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Reduced:
            return average_into_nearest(tokens.x, tokens.valid, kept)

        selector = in_all.over(Selector(choose, in_windows.needs, reduce))
        if self.keep.everything or not self.language:
            return cut(facts, VIT_OUT, self.keep, selector, self.position)
        layer = max(1, facts.layers // 2) if self.layer is None else self.layer
        before, inside = staged(self.keep, facts, layer, 3)
        second = Select(inside, top_by(Received(layer, ahead=True), self.debias), self.position)
        return ((VIT_OUT, Select(before, selector, self.position)), (llm_before(layer), second))
