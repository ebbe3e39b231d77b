"""A cut of the decoder's sequence: what a selector sees of it, and the sequence that is left."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout, compact
from vlm.models.program.program import Select, Text, Tokens
from vlm.models.program.run import Kept, Run
from vlm.models.program.segments import rows_at
from vlm.models.program.signals import Signal, question


def tokens_of(hidden: Tensor, layout: Layout, place: Tensor, valid: Tensor, run: Run, layer: int) -> Tokens:
    """The visual tokens of each sample as a selector sees them; ``place`` [B,P] is where they stand."""
    values = run.signals(layer)  # of the sequence before the cut, also for a merge that is done over again

    def at(index: Int[Tensor, "batch some"]) -> Any:
        return lambda signal: signal.take(values[signal], index)

    asks = run.asking(layer)

    def text() -> Text:
        last = layout.last(layout.visual)[:, None]
        before = torch.arange(layout.role.shape[1], device=place.device) < last
        words, real = compact((before | question(layout, asks)) & layout.valid & ~layout.visual, "right")
        return Text(rows_at(hidden, words), real, (words > last) & real, at(words))

    return Tokens(
        rows_at(hidden, place),
        valid,
        lambda: run.segment_seed(layout),
        at(place),
        run.total,
        _count_images(layout),
        layout.image.gather(1, place).masked_fill(~valid, -1),
        layout.row.gather(1, place),
        layout.col.gather(1, place),
        None,
        text,
    )


def spread(who: Signal, scores: Float[Tensor, "batch visual"], layout: Layout) -> Float[Tensor, "batch keys"]:
    """Scores of each row's visual tokens, in order, at their places in the sequence; 0 elsewhere.

    Raises ModelError when they are not as many as the visual tokens.
    """
    place, valid = compact(layout.visual, "right")
    if scores.shape != place.shape:
        expected, found = tuple(place.shape), tuple(scores.shape)
        raise ModelError(f"{who}: expected scores of (rows, visual tokens) {expected}; found {found}")
    zero = scores.new_zeros(layout.role.shape)
    return zero.scatter_add(1, place, scores.masked_fill(~valid, 0))


def given(who: Signal, scores: Float[Tensor, "batch visual"], run: Run) -> Float[Tensor, "batch keys"]:
    """Scores of each row's visual tokens before any cut, at the places of those that entered the language model.

    Raises ModelError when they are not as many, or when tokens of images that are no grids went before.
    """
    layout = run.layouts[0]
    if bool((layout.visual.sum(1) == run.total).all()):
        return spread(who, scores, layout)
    if not run.grids:
        raise ModelError(f"{who}: after a cut in the encoder, scores find their tokens in images of one grid each only")
    if scores.shape != (expected := (len(run.total), int(run.total.max()))):
        found = tuple(scores.shape)
        raise ModelError(f"{who}: expected scores of (rows, visual tokens) {expected}; found {found}")
    start, columns, image = [], [], 0
    for total in run.total.tolist():
        before = 0
        while before < total:  # the images of this row
            start.append(before)
            columns.append(run.grids[image][1])
            before, image = before + run.grids[image][0] * run.grids[image][1], image + 1
    number = layout.image.clamp_min(0)
    first, width = (torch.tensor(x or [0], device=number.device)[number] for x in (start, columns))
    place = (first + layout.row * width + layout.col).masked_fill(~layout.visual, 0)
    return scores.gather(1, place).masked_fill(~layout.visual, 0)


def resequence(
    op: Select, tokens: Tokens, chosen: Tensor, count: Tensor, layout: Layout, place: Tensor, side: Any
) -> tuple[Kept, Int[Tensor, "batch kept"], Tensor]:
    """The sequence after a cut: text stays, visual tokens are those chosen or merged. Returns the cut, where each
    token comes from, and which are real."""
    reduce = op.selector.reduce
    if reduce is None:
        keep = layout.valid & ~layout.visual
        keep = keep.scatter(1, place, (chosen & tokens.valid) | keep.gather(1, place))
        index, real = compact(keep, side)
        return Kept(index), index, real
    first = reduce(tokens, chosen, count)
    length, batch = layout.role.shape[1], len(place)
    text = layout.valid & ~layout.visual
    everywhere = torch.arange(length, device=place.device).expand(batch, length)
    source = torch.cat([everywhere, place.gather(1, first.place)], 1)  # [B, L + R]
    there = torch.cat([text, first.valid], 1)
    # in the order of the places they stand for; padding at its side
    key = source.masked_fill(~there, -1 if side == "left" else length)
    order = key.argsort(dim=1, stable=True)
    longest = int(there.sum(1).max())
    order = order[:, order.shape[1] - longest :] if side == "left" else order[:, :longest]
    index, real = source.gather(1, order), there.gather(1, order)
    merged = (order >= length) & real
    number = (order - length).clamp_min(0)

    def merge(hidden: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return rows_at(first.features, number)
        again = Tokens(**{**vars(tokens), "x": rows_at(hidden, place)})
        return rows_at(reduce(again, chosen, count).features, number)

    return Kept(index, merge, merged), index, real


def _count_images(layout: Layout) -> Int[Tensor, " batch"]:
    image = layout.image.sort(1).values
    return ((image[:, 1:] != image[:, :-1]) & (image[:, 1:] >= 0)).sum(1) + (image[:, 0] >= 0)
