"""What preference objectives share: log-probabilities of answers, the terms of their losses, and the reference model.

    log p(answer)  ->  margin against the reference  ->  terms of the loss, one number per pair

Source: DPO (NeurIPS 2023), equation 7. Each objective in this folder is a choice of terms.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.models.base import BaseVlm, Supervised
from vlm.models.errors import ModelError
from vlm.models.lora import without_adapters
from vlm.models.program.perturb import cropped, diffused
from vlm.training.loss import Loss, inputs_of

SHORTEST_MATCH = 3  # tokens; RLHF-V takes shorter agreements for chance

ReferenceKind = Literal["start", "adapter", "none"]
Values = dict[str, Tensor]  # name of an answer -> its log-probability [pairs]


@dataclass(frozen=True)
class Preference:
    """The terms of a preference loss and their weights; with the defaults it is DPO.

    Options are those of :class:`~vlm.objectives.dpo.Dpo`; own_weight and own_step those of
    :class:`~vlm.objectives.povid.Povid`.
    """

    beta: float = 0.1
    reference: ReferenceKind = "start"
    smoothing: float = 0.0
    lm_weight: float = 0.0
    segment_weight: float = 1.0
    average: bool = False
    image_weight: float = 0.0
    image_change: Literal["crop", "noise"] = "crop"
    anchor_weight: float = 0.0
    anchor: float = 0.0
    own_weight: float = 0.0
    own_step: int = 500

    def build(self) -> "PreferenceLoss":
        """Raises ModelError for values that make no loss."""
        if not self.beta > 0:
            raise ModelError(f"beta: expected a number above 0; found {self.beta:g}")
        if not 0 <= self.smoothing < 0.5:
            raise ModelError(f"smoothing: expected a share from 0 to below 0.5; found {self.smoothing:g}")
        if self.own_weight and self.reference == "start":
            raise ModelError(
                "reference: start knows log-probabilities of answers in the data alone; the model's own answers change "
                "with it, so take reference: adapter (or none)"
            )
        return PreferenceLoss(self)


def token_log_probs(found: Supervised, weights: Float[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
    """log p of every supervised token at its place in the batch, 0 elsewhere."""
    each = -nn.functional.cross_entropy(found.logits, found.target, reduction="none")
    return _placed(each, found, weights)


def _placed(
    each: Float[Tensor, " supervised"], found: Supervised, like: Float[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    return torch.zeros_like(like, dtype=each.dtype).index_put((found.row, found.place), each)


def answer_log_prob(
    log_probs: Float[Tensor, "batch length"], weights: Float[Tensor, "batch length"], average: bool = False
) -> Float[Tensor, " batch"]:
    """log p of each answer: the weighted sum over its tokens, or their weighted mean."""
    total = (log_probs * weights).sum(1)
    return total / weights.sum(1).clamp_min(1e-6) if average else total


def pair_loss(margin: Float[Tensor, " batch"], smoothing: float = 0.0) -> Float[Tensor, " batch"]:
    """-log sigmoid(margin); with label smoothing a share of the pairs counts as labelled the wrong way round.

    Source: DPO (NeurIPS 2023), equation 7; smoothing: conservative DPO, a note by Mitchell (2023), equation 3.
    """
    right, wrong = (nn.functional.logsigmoid(sign * margin) for sign in (1, -1))
    return -(1 - smoothing) * right - smoothing * wrong


def changed(ours: Sequence[int], theirs: Sequence[int]) -> list[bool]:
    """Which tokens of ``ours`` lie outside every stretch of at least three that both answers share, in order.

    Source: RLHF-V (CVPR 2024), section 3.2 and its code. Python's matcher is told to leave no token out for being
    frequent, as it otherwise does in answers of 200 tokens and more.
    """
    marks = [True] * len(ours)
    for start, _, size in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        if size >= SHORTEST_MATCH:
            marks[start : start + size] = [False] * size
    return marks


def segment_weights(batch: Batch, other: Batch, weight: float) -> Float[Tensor, "batch length"]:
    """The batch's loss weights, times ``weight`` where a token was corrected: see :func:`changed`."""
    if weight == 1:
        return batch.weights
    factor = torch.ones_like(batch.weights, device="cpu")
    ours, theirs = (_answers(one) for one in (batch, other))
    for row, ((places, tokens), (_, others)) in enumerate(zip(ours, theirs, strict=True)):
        where = [place for place, mark in zip(places, changed(tokens, others), strict=True) if mark]
        factor[row, where] = weight
    return batch.weights * factor.to(batch.weights.device)


def _answers(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Places and tokens of what is supervised, row by row."""
    rows = zip(batch.tokens.tolist(), (batch.weights > 0).tolist(), strict=True)
    places = [(tokens, [n for n, learned in enumerate(marks) if learned]) for tokens, marks in rows]
    return [(where, [tokens[n] for n in where]) for tokens, where in places]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In this block every module below ``model`` is in evaluation mode (no dropout), and nothing has a gradient.

    The model itself keeps its mode: in training it runs its vision path on every rank, which ranks count on.
    """
    modes = [(module, module.training) for module in model.modules() if module is not model]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class PreferenceLoss(nn.Module):
    """The loss of a batch of pairs. It has no parameters of its own.

    start: the log-probabilities of the model as it was at the start of the stage, by the key of the pair, where the
    reference is that; filled in by :mod:`vlm.training.reference`. recording: while it is a mapping, a call puts them
    there and learns nothing.
    """

    def __init__(self, terms: Preference) -> None:
        super().__init__()
        self.terms = terms
        self.start: dict[str, list[float]] | None = None
        self.recording: dict[str, list[float]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The answers whose log-probabilities are compared with the reference's."""
        terms = self.terms
        blind, own = ["blind"] * (terms.image_weight > 0), ["own"] * (terms.own_weight > 0)
        return ("chosen", "rejected", *blind, *own)

    @property
    def needs_start(self) -> bool:
        """Whether log-probabilities of the stage's start must be known before its first step."""
        return self.terms.reference == "start"

    def forward(self, model: BaseVlm, batch: Batch) -> Loss:
        assert batch.rejected is not None, "a stage of pairs collates pairs"
        weights = tuple(
            segment_weights(one, other, self.terms.segment_weight)
            for one, other in ((batch, batch.rejected), (batch.rejected, batch))
        )
        if self.recording is not None:
            return self._record(model, batch, weights)
        own = self._own(model, batch) if self.terms.own_weight else None
        reference = self._reference(model, batch, weights, own)
        ours, mean = self._values(model, batch, weights, own)
        return self._loss(ours, reference, mean, batch)

    def _values(
        self, model: BaseVlm, batch: Batch, weights: Sequence[Tensor], own: Tensor | None
    ) -> tuple[Values, Tensor]:
        """log p of every answer, and the mean log p of a token of the chosen one."""
        rejected, terms = batch.rejected, self.terms
        assert rejected is not None
        found = model.supervised(inputs_of(batch), batch.weights)
        each = token_log_probs(found, batch.weights)
        values = {"chosen": answer_log_prob(each, weights[0], terms.average)}
        mean = answer_log_prob(each, batch.weights, average=True)
        if own is not None:
            others = token_log_probs(found._replace(target=own[found.row, found.place]), batch.weights)
            values["own"] = answer_log_prob(others, batch.weights, terms.average)
        each = token_log_probs(model.supervised(inputs_of(rejected), rejected.weights), rejected.weights)
        values["rejected"] = answer_log_prob(each, weights[1], terms.average)
        if terms.image_weight:
            inputs = model.map_pixels(inputs_of(batch), self._worse)
            each = token_log_probs(model.supervised(inputs, batch.weights), batch.weights)
            values["blind"] = answer_log_prob(each, weights[0], terms.average)
        return values, mean

    def _worse(self, pixels: Tensor, number: int) -> Tensor:
        """A picture that shows less, the same one whenever it is asked for."""
        return cropped(pixels) if self.terms.image_change == "crop" else diffused(pixels, self.terms.own_step)

    def _own(self, model: BaseVlm, batch: Batch) -> Int[Tensor, "batch length"]:
        """What the model would say, token by token after the chosen answer so far, if it saw the image noised."""
        with evaluating(model):
            noised = model.map_pixels(inputs_of(batch), lambda pixels, number: diffused(pixels, self.terms.own_step))
            found = model.supervised(noised, batch.weights)
        return batch.tokens.clone().index_put((found.row, found.place), found.logits.argmax(-1))

    def _reference(self, model: BaseVlm, batch: Batch, weights: Sequence[Tensor], own: Tensor | None) -> Values:
        if self.terms.reference == "adapter":
            with evaluating(model), without_adapters(model):
                return self._values(model, batch, weights, own)[0]
        if self.terms.reference == "none":
            return {name: batch.weights.new_zeros(len(batch.keys)) for name in self.names}
        assert self.start is not None and batch.rejected is not None, "filled in before the first step"
        nothing = [0.0] * len(self.names)  # of a blank in place of an unreadable sample, which counts for nothing
        rows = [self.start.get(key, nothing) for key in batch.rejected.keys]
        table = torch.tensor(rows, dtype=torch.float32, device=batch.weights.device)
        return dict(zip(self.names, table.unbind(1), strict=True))

    def _record(self, model: BaseVlm, batch: Batch, weights: Sequence[Tensor]) -> Loss:
        assert self.recording is not None and batch.rejected is not None
        with evaluating(model):
            values, _ = self._values(model, batch, weights, None)
        rows = torch.stack([values[name] for name in self.names], 1).float().tolist()
        self.recording |= dict(zip(batch.rejected.keys, rows, strict=True))
        zero = batch.weights.new_zeros(())
        return Loss(zero, zero, {})

    def _loss(self, ours: Values, reference: Values, mean: Tensor, batch: Batch) -> Loss:
        terms = self.terms
        assert batch.rejected is not None
        reward = {name: terms.beta * (ours[name] - reference[name]) for name in ours}  # [pairs] each
        margin = reward["chosen"] - reward["rejected"]
        each = pair_loss(margin, terms.smoothing)
        if terms.own_weight:
            own = pair_loss(reward["chosen"] - reward["own"], terms.smoothing)
            each = (1 - terms.own_weight) * each + terms.own_weight * own
        if terms.image_weight:
            shown = _shows_image(batch).to(each.dtype)
            each = each + terms.image_weight * shown * pair_loss(reward["chosen"] - reward["blind"], terms.smoothing)
        if terms.anchor_weight:
            each = each + terms.anchor_weight * pair_loss(reward["chosen"] - terms.anchor)
        if terms.lm_weight:
            each = each - terms.lm_weight * mean
        real = ((batch.weights > 0).any(1) & (batch.rejected.weights > 0).any(1)).to(each.dtype)
        count = real.sum()
        logs = {"accuracy": (margin > 0).to(each.dtype), "margin": margin, "reward_chosen": reward["chosen"]}
        shown = {name: (value.detach() * real).sum() / count.clamp_min(1) for name, value in logs.items()}
        return Loss((each * real).sum(), count, shown)


def _shows_image(batch: Batch) -> Bool[Tensor, " batch"]:
    rows = torch.arange(len(batch.keys), device=batch.image_owner.device)
    return (rows[:, None] == batch.image_owner).any(1)
