"""The catalogue of selectors: which tokens stay. Pure functions that mark tokens, and the Selectors of the pruners.

Every choice is per segment and independent of padding and of the other segments. Ties go to the earlier token.
``count[s]`` tokens are marked, or all when a segment has fewer. Selectors that look at features are in
:mod:`vlm.models.program.diverse`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.debias import SHOWN, Debias, PatchPlace, PatchShown
from vlm.models.program.diverse import max_min_order
from vlm.models.program.program import Selector, Tokens
from vlm.models.program.reduce import Reduced, add_weighted_neighbours
from vlm.models.program.segments import descending, marks, numbers, ranks
from vlm.models.program.signals import RasterShare, Received, Signal


def top(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]
) -> Bool[Tensor, "segments tokens"]:
    """Mark the ``count[s]`` valid tokens of largest score in each segment, the earlier one of a tie."""
    return (ranks(score, valid) < count[:, None]) & valid


def top_per_group(
    score: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    group: Int[Tensor, "segments tokens"],
    quota: Int[Tensor, "segments groups"],
) -> Bool[Tensor, "segments tokens"]:
    """Mark the ``quota[s, g]`` tokens of largest score of each group (a window, a chunk, a crop)."""
    groups, place = quota.shape[1], torch.arange(score.shape[1], device=score.device)
    order = descending(score, valid)
    own = group.masked_fill(~valid, groups).gather(1, order)  # padding is a group of its own, the last
    by_group = own.argsort(dim=1, stable=True)
    order, own = order.gather(1, by_group), own.gather(1, by_group)
    first = torch.searchsorted(own, own)  # where the group of each sorted token begins
    hit = place - first < torch.nn.functional.pad(quota, (0, 1)).gather(1, own)
    return torch.zeros_like(valid).scatter(1, order, hit)


def windows_of(
    row: Int[Tensor, "segments tokens"], column: Int[Tensor, "segments tokens"], size: int
) -> Int[Tensor, "segments tokens"]:
    """Number of the ``size`` by ``size`` window that each token of a grid lies in."""
    across = int(column.max()) // size + 1 if column.numel() else 1
    return row.clamp_min(0) // size * across + column.clamp_min(0) // size


def windows_and_rest(
    local: Float[Tensor, "segments tokens"],
    overall: Float[Tensor, "segments tokens"],
    valid: Bool[Tensor, "segments tokens"],
    window: Int[Tensor, "segments tokens"],
    count: Int[Tensor, " segments"],
    share: float = 0.5,
) -> Bool[Tensor, "segments tokens"]:
    """``share`` of the budget evenly over windows by ``local`` score, the rest over all others by ``overall``.

    What does not divide by the number of windows, or what a small window lacks, goes to the rest (the code keeps
    fewer tokens then). Source: VScan (TMLR 2026), section 3.1: window 6, an early layer and the last but one.
    """
    groups = int(window.max()) + 1 if window.numel() else 1
    there = torch.zeros(len(valid), groups, device=valid.device).scatter_add(1, window, valid.float()) > 0
    each = (count.double() * share).long() // there.sum(1).clamp_min(1)
    kept = top_per_group(local, valid, window, each[:, None].expand(-1, groups))
    return kept | top(overall, valid & ~kept, count - kept.sum(1))


def outliers(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"], factor: float = 1.5
) -> Bool[Tensor, "segments tokens"]:
    """Tokens above the third quartile by more than ``factor`` quartile distances; the best one where none is.

    Quartiles are interpolated linearly. Source: LLaVA-PruMerge (arXiv 2403.15388), section 3.2.
    """
    ordered = score.masked_fill(~valid, torch.inf).sort(dim=1).values
    last = (valid.sum(1, keepdim=True) - 1).clamp_min(0)

    def quantile(q: float) -> Tensor:  # [S,1]
        at = last * q
        low, high = (ordered.gather(1, edge.long()) for edge in (at.floor(), at.ceil()))
        return torch.where(at == at.floor(), low, low + (high - low) * (at - at.floor()))

    low, high = quantile(0.25), quantile(0.75)
    far = (score > high + factor * (high - low)) & valid
    return far | (top(score, valid, torch.ones_like(last[:, 0])) & ~far.any(1, keepdim=True))


def every_nth(
    valid: Bool[Tensor, "segments tokens"], step: Int[Tensor, " segments"]
) -> Bool[Tensor, "segments tokens"]:
    """Tokens number 0, step, 2 step ... of each segment, but never the last one.

    PruMerge+ adds these to the outliers, with step ``max(1, (tokens // outliers) // 3)``.
    Source: LLaVA-PruMerge (arXiv 2403.15388), section 3.4; the range is the code's.
    """
    number = numbers(valid)
    return (number % step[:, None] == 0) & (number < valid.sum(1, keepdim=True) - 1) & valid


def even(valid: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
    """Tokens at even distances: of n tokens, number floor((i + 1/2) n / count) for i < count."""
    total, wanted = valid.sum(1, keepdim=True), count[:, None]  # [S,1]
    wanted = wanted.minimum(total)
    step = torch.arange(int(wanted.max()) if wanted.numel() else 0, device=count.device)
    number = ((2 * step + 1) * total).div(2 * wanted.clamp_min(1), rounding_mode="floor")  # [S,C], exact
    spare = valid.shape[1]  # a column for the steps beyond a segment's own count
    column = torch.where(step < wanted, number, spare)
    hit = valid.new_zeros(len(count), spare + 1).scatter(1, column, True)
    return hit.gather(1, numbers(valid)) & valid


def random_scores(
    valid: Bool[Tensor, "segments tokens"], seeds: Int[Tensor, " segments"], seed: int
) -> Float[Tensor, "segments tokens"]:
    """Uniform numbers, drawn anew for each segment from ``seed`` and the segment's own integer."""
    score = torch.zeros(valid.shape)
    for s, own_seed in enumerate(seeds.tolist()):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + own_seed) % 2**63)
        own = int(valid[s].sum())  # as many draws as tokens: padding must not shift the stream
        score[s, valid[s].cpu()] = torch.rand(own, generator=generator)
    return score.to(valid.device)


def top_by(signal: Signal, debias: Debias | None = None) -> Selector:
    """The tokens of largest signal (one value a token), its bias for late places taken out if asked."""
    needs, score = scored_by(signal, debias)
    return Selector(lambda tokens, count: top(score(tokens), tokens.valid, count), needs)


def scored_by(
    signal: Signal, debias: Debias | None = None
) -> tuple[tuple[Signal, ...], Callable[[Tokens], Float[Tensor, "segments tokens"]]]:
    """The signals that a score needs, and the score: the signal (mean over heads where it has them), debiased if asked.

    Places are those in the image before any cut of the language model; in the encoder, in the view before any cut.
    """
    if debias is None:
        return (signal,), lambda tokens: per_patch(tokens, signal)
    place, shown = (PatchPlace(), PatchShown()) if signal.part == "vision" else (RasterShare(), SHOWN)
    if debias.padding is None:
        return (signal, place), lambda tokens: debias(per_patch(tokens, signal), tokens.valid, tokens.signal(place))

    def score(tokens: Tokens) -> Float[Tensor, "segments tokens"]:
        value = per_patch(tokens, signal)
        return debias(value, tokens.valid, tokens.signal(place), tokens.signal(shown))

    return (signal, place, shown), score


class Ranking(NamedTuple):
    """A score of the encoder's patches, debiased if asked, and the signals it needs: see :func:`scored_by`."""

    needs: tuple[Signal, ...]
    score: Callable[[Tokens], Float[Tensor, "segments tokens"]]
    debias: Debias | None = None

    @classmethod
    def of(cls, signal: Signal, debias: Debias | None) -> "Ranking":
        return cls(*scored_by(signal, debias), debias)

    def over(self, selector: Selector, adaptive: bool = False) -> Selector:
        """A selector whose functions use the score, with the signals that it takes.

        With padding suppressed, patches of padding are hidden from the whole method, from what is chosen without a
        score and what others are merged into as well; but for the best of them where the budget is larger than the
        picture. adaptive: the selector decides itself how many stay, and asks for none of these.
        """
        needs = (*selector.needs, *(need for need in self.needs if need not in selector.needs))
        choose, reduce = selector.choose, selector.reduce
        if self.debias is None or self.debias.padding is None:
            return Selector(choose, needs, reduce)

        def bare(tokens: Tokens, count: Int[Tensor, " segments"]) -> Tokens:
            return self._without_padding(tokens, torch.ones_like(count) if adaptive else count)

        return Selector(
            lambda tokens, count: choose(bare(tokens, count), count),
            needs,
            None if reduce is None else lambda tokens, kept, count: reduce(bare(tokens, count), kept, count),
        )

    def _without_padding(self, tokens: Tokens, count: Int[Tensor, " segments"]) -> Tokens:
        """The tokens without those of padding, but not fewer than ``count``."""
        score = self.score(tokens)
        shown = tokens.valid & (score >= 0)
        more = top(score, tokens.valid & ~shown, (count - shown.sum(1)).clamp_min(0))
        return replace(tokens, valid=shown | more)


def attention_from_last_row(layer: int, debias: Debias | None = None) -> Selector:
    """The tokens that the last row of decoder layer ``layer`` attends to most (mean over heads)."""
    return top_by(Received(layer), debias)


def uniform_random(seed: int) -> Selector:
    """A uniformly random subset, drawn anew for each segment from ``seed`` and the segment's pixels."""

    def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
        return top(random_scores(tokens.valid, tokens.seed(), seed), tokens.valid, count)

    return Selector(choose)


def even_stride() -> Selector:
    """Tokens at even distances (:func:`even`)."""
    return Selector(lambda tokens, count: even(tokens.valid, count))


def max_min_diversity() -> Selector:
    """The most diverse subset in the greedy max-min sense (DivPrune)."""

    def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
        return marks(max_min_order(tokens.x, tokens.valid, int(count.max())), tokens.valid, count)

    return Selector(choose)


def added_to_neighbours(
    choose: Callable[[Tokens, Int[Tensor, " segments"]], Bool[Tensor, "segments tokens"]],
    score: Signal,
    keys: Signal,
    neighbours: int,
) -> Selector:
    """Patches chosen by ``choose``, to which their nearest neighbours and the rest of the image are added (PruMerge):
    see :func:`~vlm.models.program.reduce.add_weighted_neighbours`. score: one value a patch, or one a head."""

    def reduce(tokens: Tokens, kept: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]) -> Reduced:
        key = tokens.signal(keys).transpose(1, 2).flatten(2)  # [S,P,heads * dim]
        return add_weighted_neighbours(tokens.x, key, per_patch(tokens, score), tokens.valid, kept, neighbours)

    return Selector(choose, (score, keys), reduce)


def per_patch(tokens: Tokens, score: Signal) -> Float[Tensor, "segments tokens"]:
    """A score of tokens, mean over heads where it has one for each."""
    value = tokens.signal(score)
    return value.mean(1) if value.ndim == 3 else value
