"""Gaze shifts: what each word of a question newly looks at in the image, and attention that follows them.

Source: "Capturing Gaze Shifts for Guidance" (GIFT, ICML 2026), section 3; official code.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.inside import row_scores
from vlm.models.program.layout import compact
from vlm.models.program.observe import observe
from vlm.models.program.program import Keys
from vlm.models.program.signals import Attention

# Words that name nothing to look at, and those by which chat templates mark who speaks.
_STOP_TEXT = (
    "a about above after again against all also am an and any are as at be because been before being below "
    "between both but by can could did do does doing down during each either else few for from further had has "
    "have having he her here hers him his how i if in into is it its itself just let may me might mine more most "
    "must my neither no nor not of off on once only or other our ours out over own per please same shall she "
    "should so some such than that the their theirs them then there these they this those though through to too "
    "under until up upon us very was we were what when where whether which while who whom whose why will with "
    "would yes you your yours assistant human system user im end start s t re ve ll d m "
)
STOP_WORDS = frozenset(_STOP_TEXT.split())


def content_words(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> list[bool]:
    """Which tokens spell something other than a stop word or punctuation, each read by itself."""
    words = {token: decode([token]).strip().strip("▁Ġ").lower() for token in set(tokens)}
    content = {token: any(map(str.isalnum, word)) and word not in STOP_WORDS for token, word in words.items()}
    return [content[token] for token in tokens]


class _Shifts:
    """Adds up, over layers, the gaze shifts of the question's content words to each visual token."""

    def __init__(self, layers: Collection[int], content: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.layers, self.content = layers, content
        self.heat: Float[Tensor, "batch visual"] | None = None
        self.real: Bool[Tensor, "batch visual"] | None = None

    def __call__(self, layer: int, seen: Attention) -> None:
        if layer not in self.layers:
            return
        layout = seen.layout
        assert layout is not None
        row, asked = compact(Keys(layout, lambda signal: layout.role).question, "right")  # [B,R]
        place, self.real = compact(layout.visual, "right")  # [B,V]
        kept = asked & self.content(row, asked)
        now, before = (_to_image(seen, rows, place) for rows in (row, row - 1))
        shift = (now - before).clamp_min(0) * (kept[..., None] & self.real[:, None])[:, None]  # [B,H,R,V]
        count = max(shift.shape[1] // 2, 1)
        total = shift.sum((2, 3))
        chosen = torch.zeros_like(total).scatter(1, total.topk(count, 1).indices, 1.0)
        mean = (shift * chosen[..., None, None]).sum((1, 2)) / (count * kept.sum(1, keepdim=True).clamp_min(1))
        self.heat = mean if self.heat is None else self.heat + mean


def _to_image(
    seen: Attention, row: Int[Tensor, "batch rows"], place: Int[Tensor, "batch visual"]
) -> Float[Tensor, "batch heads rows visual"]:
    """Attention of some rows of a prompt to its visual tokens."""
    row = row.clamp_min(0)
    own = seen.q.gather(2, row[:, None, :, None].expand(-1, seen.q.shape[1], -1, seen.q.shape[3]))
    keys = torch.arange(seen.k.shape[2], device=row.device)
    visible = seen.valid[:, None] & (keys <= row[..., None])
    visible = visible | (keys == row[..., None])  # an unused row of padding sees itself, so that it is a number
    weights = row_scores(own, seen.k, visible, seen.common.get("scale")).softmax(-1)
    return weights.gather(3, place[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1))


def gaze_shifts(
    model: Any, inputs: Any, layers: Collection[int], decode: Callable[[Sequence[int]], str]
) -> Float[Tensor, "batch visual"]:
    """From 0 to 1 for each visual token of each row, in order: how much the content words of the question (the text
    after the last image) newly look at it. 0 in a row that has no such word.

    A shift is what a word's attention to the token exceeds the one before's by; it is averaged over words, the half of
    the heads that shift most, and layers, clipped at three standard deviations and stretched. Takes a pass of its own.
    """
    device = inputs.tokens.device

    def content(row: Int[Tensor, "batch rows"], asked: Bool[Tensor, "batch rows"]) -> Bool[Tensor, "batch rows"]:
        marks = torch.zeros(row.shape, dtype=torch.bool)
        for b, count in enumerate(asked.sum(1).tolist()):
            text = inputs.tokens[b][inputs.valid[b]].tolist()  # a question is the end of its prompt, token by token
            marks[b, :count] = torch.tensor(content_words(decode, text[len(text) - count :]), dtype=torch.bool)
        return marks.to(device)

    shifts = _Shifts(layers, content)
    with torch.no_grad(), observe(model, shifts):
        model.prefill(inputs)
    assert shifts.heat is not None and shifts.real is not None
    return stretched(shifts.heat, shifts.real)


def stretched(heat: Float[Tensor, "batch visual"], real: Bool[Tensor, "batch visual"]) -> Float[Tensor, "batch visual"]:
    """Each row clipped at three standard deviations around its mean, then from 0 to 1; 0 where all are equal."""
    count = real.sum(1, keepdim=True).clamp_min(1)
    mean = heat.masked_fill(~real, 0).sum(1, keepdim=True) / count
    spread = ((heat - mean).square().masked_fill(~real, 0).sum(1, keepdim=True) / count).sqrt()
    heat = torch.minimum(torch.maximum(heat, mean - 3 * spread), mean + 3 * spread)
    if not heat.shape[1]:
        return heat
    low = heat.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = heat.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    return ((heat - low) / (high - low).where(high > low, 1)).masked_fill(~real, 0)


def follow(
    weights: Float[Tensor, "batch heads keys"],
    salience: Float[Tensor, "batch keys"],
    visual: Bool[Tensor, "batch keys"],
    question: Bool[Tensor, "batch keys"],
) -> Float[Tensor, "batch heads keys"]:
    """Attention that follows the gaze; rows sum to one.

    The half of the heads that look most at the image multiply its weights by ``salience``, the half that look most at
    the question multiply its weights by what the image gained.
    """
    count = max(weights.shape[1] // 2, 1)
    of_image, of_question = (weights * mask[:, None] for mask in (visual, question))
    lookers, askers = (_top(part.sum(2), count) for part in (of_image, of_question))  # [B,H]
    gained = of_image * torch.where(lookers[..., None], salience[:, None].to(weights.dtype), 1)
    before, after = ((part.sum(2) * lookers).sum(1) for part in (of_image, gained))  # [B]
    factor = torch.where(before > 0, after / before.where(before > 0, 1), 1)[:, None, None]
    asked = torch.where(askers[..., None], factor, 1) * of_question
    out = torch.where(visual[:, None], gained, torch.where(question[:, None], asked, weights))
    return out / out.sum(2, keepdim=True)


def _top(mass: Float[Tensor, "batch heads"], count: int) -> Bool[Tensor, "batch heads"]:
    chosen = mass.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, chosen, True)
