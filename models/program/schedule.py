"""Which decoder layers see how many visual tokens: the four meanings of a budget, and what a schedule costs.

Papers mean four things by "T tokens", and FastV "at 192" differs by up to 20 points of POPE between them:
``final`` (tokens after the last cut), ``after_layer`` (after the first cut), ``average`` (over the decoder's layers)
and a total of ``flops`` or ``kv_bytes``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget, Meaning
from vlm.models.program.shape import DecoderShape
from vlm.models.program.signals import Facts

TEXT = 64  # text tokens of a typical prompt, which FLOPs and cache bytes count besides the visual ones


@dataclass(frozen=True)
class BudgetReport:
    """What a schedule keeps and costs, in all four meanings.

    visual: visual tokens in each layer. text: other tokens, the same in each. held: cache entries of each key/value
    head in each layer. after_layer and final: after the first and the last cut.
    """

    visual: tuple[float, ...]
    text: float
    flops: float
    kv_bytes: float
    held: tuple[float, ...]

    @property
    def average(self) -> float:
        return sum(self.visual) / len(self.visual)

    @property
    def after_layer(self) -> float:
        return next((n for n in self.visual if n != self.visual[0]), self.visual[0])

    @property
    def final(self) -> float:
        return self.visual[-1]


def tokens_per_layer(visual: float, cuts: Sequence[int], after: Sequence[float], layers: int) -> tuple[float, ...]:
    """Visual tokens in each decoder layer: ``after[i]`` from layer ``cuts[i]`` on, ``visual`` before the first cut.

    A cut on the *output* of layer l is a cut at l + 1: layer l still works on all.
    Raises ValueError unless cuts ascend within the decoder and counts do not grow.
    """
    _check_cuts(cuts, layers)
    counts = (visual, *after)
    if len(after) != len(cuts) or any(b > a for a, b in pairwise(counts)):
        raise ValueError(f"after: expected {len(cuts)} counts that do not grow from {visual}; found {tuple(after)}")
    return tuple(counts[sum(cut <= layer for cut in cuts)] for layer in range(layers))


def report(
    per_layer: Sequence[float], text: float, decoder: DecoderShape, held: Sequence[float] | None = None
) -> BudgetReport:
    """The cost of one prompt of ``text`` other tokens with ``per_layer`` visual ones.

    held: cache entries of each key/value head in each layer where a cache policy drops some; all by default.
    """
    flops = sum(decoder.flops(n + text) for n in per_layer)
    held = tuple(n + text for n in per_layer) if held is None else tuple(held)
    return BudgetReport(tuple(per_layer), text, flops, sum(map(decoder.kv_bytes, held)), held)


def solve(
    target: float,
    meaning: Meaning,
    visual: int,
    cuts: Sequence[int],
    decoder: DecoderShape,
    *,
    shares: Sequence[float] | None = None,
    text: float = 0,
) -> tuple[int, ...]:
    """Tokens after each cut so that the budget in ``meaning`` is ``target``.

    visual: tokens before the first cut. cuts: decoder layers at whose input tokens go. shares: the counts after the
    cuts are proportional to these; without shares each cut keeps the same share of what the one before left
    (PyramidDrop). text: other tokens, which FLOPs and cache bytes count.

    The real solution is unique, since every meaning grows with the counts; each count is then rounded to the nearest
    whole number. FastV at layer 2 of 32 for an average of 192 of 576 keeps 166.

    Raises ValueError when no counts from 1 to ``visual`` reach the target: the range that can be reached is named.
    """
    _check_cuts(cuts, decoder.layers)

    def counts(x: float) -> list[float]:
        factors = [x ** (i + 1) for i in range(len(cuts))] if shares is None else [x * s / shares[0] for s in shares]
        return [max(1.0, visual * factor) for factor in factors]

    def value(x: float) -> float:
        after = counts(x)
        if meaning in ("final", "after_layer"):
            return after[-1 if meaning == "final" else 0]
        found = report(tokens_per_layer(visual, cuts, after, decoder.layers), text, decoder)
        return getattr(found, meaning)

    if shares is not None and (len(shares) != len(cuts) or list(shares) != sorted(shares, reverse=True)):
        raise ValueError(f"shares: expected {len(cuts)} numbers that do not grow; found {tuple(shares)}")
    least, most = value(0.0), value(1.0)
    if not least <= target * (1 + 1e-12) or not target <= most * (1 + 1e-12):
        reach = f"from {least:.6g} to {most:.6g} with cuts at layers {', '.join(map(str, cuts))}"
        raise ValueError(f"budget: expected a target of {meaning} {reach} of {decoder.layers}; found {target:g}")
    return tuple(round(n) for n in counts(_bisect(value, target)))


def _bisect(value: Callable[[float], float], target: float) -> float:
    """The x from 0 to 1 at which a growing function reaches ``target``."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < target else (low, middle)
    return high


def _check_cuts(cuts: Sequence[int], layers: int) -> None:
    edges = [-inf, *cuts, layers]
    if not cuts or min(cuts) < 0 or any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"cuts: expected ascending layers from 0 to {layers - 1}; found {tuple(cuts)}")


def flow_removals(concentration: float, tokens: int, target: int, layers_left: int) -> int:
    """Tokens that FlowCut removes after an encoder layer, at most down to ``target``.

    concentration: :func:`~vlm.models.program.scores.entropy_share` of the class token's attention (1 is even: none
    is removed). layers_left: encoder layers until the one whose output is used, 0 removes all that is left over.
    The official code takes the largest number over the batch. Source: FlowCut (NeurIPS 2025), section 3.3.
    """
    excess = max(tokens - target, 0)
    if layers_left == 0:
        return excess
    return min(excess, max(0, round(excess / layers_left**0.5 * (1 - concentration**2))))


def removed_shares(progress: float, draw: float) -> tuple[float, float]:
    """Shares of visual tokens that student and teacher lose at ``progress`` (0 to 1) of a training run.

    draw: uniform in [0, 1), the same on every rank. Source: EPIC (NeurIPS 2025), section 3.3 and official code.
    """
    progress = min(max(progress, 0.0), 1.0)
    low, high = 0.1 + 0.16 * progress, min(1.0, 0.1 + 0.64 * progress)
    student = low + draw * (high - low)
    return student, max(0.0, student - min(0.3, 0.1 + 0.5 * progress))


def budgets(keep: Budget, facts: Facts, cuts: Sequence[int], shares: Sequence[float] | None = None) -> list[Budget]:
    """What stays after each cut so that ``keep`` is met in its own meaning: budgets that mean tokens left by the cut.

    cuts: decoder layers at whose input tokens go, 0 for a cut before the language model. shares: see :func:`solve`.
    A share of a model whose images differ in size is solved for an image of 576 tokens, and so exact only where cost
    is linear in tokens (all meanings but ``flops``).

    Raises ModelError for a budget that cannot be met with these cuts, or a number of tokens (other than ``final``)
    where the tokens of an image are not known before it is seen.
    """
    if len(cuts) == 1 and keep.meaning in ("final", "after_layer"):
        return [Budget(keep.ratio, keep.tokens)]
    visual = facts.visual or 576
    if facts.visual is None and keep.tokens is not None:
        raise ModelError(f"prune.keep: expected a share, since images differ in their tokens here; found {keep}")
    shape = facts.shape
    if shape is None:
        raise ModelError(f"prune.keep: {keep} needs the decoder's shape, which this model does not tell")
    target: float = keep.tokens if keep.tokens is not None else 0
    if keep.tokens is None:
        whole = report([visual] * facts.layers, TEXT, shape)
        full = {"flops": whole.flops, "kv_bytes": whole.kv_bytes}.get(keep.meaning, visual)
        target = (keep.ratio or 1.0) * full
    try:
        after = solve(target, keep.meaning, visual, cuts, shape, shares=shares, text=TEXT)
    except ValueError as error:
        raise ModelError(f"prune.keep: {error}") from None
    return [Budget(ratio=n / visual) if facts.visual is None else Budget(tokens=n) for n in after]


def staged(keep: Budget, facts: Facts, layer: int, more: float) -> list[Budget]:
    """What a cut before the language model and a second one at the input of decoder layer ``layer`` leave.

    ``more`` times as many stay after the first as after the second, or all where there are not so many.
    Raises ModelError as :func:`budgets` does.
    """
    if keep.meaning != "final":
        return budgets(keep, facts, [0, layer], (more, 1))
    if keep.tokens is not None:
        return [Budget(tokens=round(keep.tokens * more)), Budget(tokens=keep.tokens)]
    share = keep.ratio or 1.0
    return [Budget(ratio=min(1.0, share * more)), Budget(ratio=share)]


def withdrawal_layer(keep: Budget, facts: Facts) -> int:
    """The decoder layer, from 1 on, before which all visual tokens go so that ``keep`` is met most nearly.

    Raises ModelError for a budget that says how many tokens are left at the end, or a number of them where the tokens
    of an image are not known before it is seen.
    """
    if keep.meaning in ("final", "after_layer"):
        raise ModelError(
            f"prune.keep: no visual token is left at the end; expected average, flops or kv_bytes, found {keep}"
        )
    if facts.shape is None or (facts.visual is None and keep.tokens is not None):
        raise ModelError(f"prune.keep: expected a share, since images differ in their tokens here; found {keep}")
    visual, shape = facts.visual or 576, facts.shape

    def cost(layer: int) -> float:
        left = tokens_per_layer(visual, [layer], [0], facts.layers) if layer < facts.layers else [visual] * facts.layers
        return getattr(report(left, TEXT, shape), keep.meaning)

    target = keep.tokens if keep.tokens is not None else (keep.ratio or 1.0) * cost(facts.layers)
    return min(range(1, facts.layers), key=lambda layer: abs(cost(layer) - target))
