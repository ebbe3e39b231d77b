"""A guide: another pass, of a smaller model or of the model itself, that says which visual tokens matter.

Source: "A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs" (SGL, CVPR 2025).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.layout import Layout, compact
from vlm.models.program.observe import observe
from vlm.models.program.program import DECODE, LLM_IN, Answered, Cascade, Program, cut
from vlm.models.program.select import top_by
from vlm.models.program.signals import Attention, Facts, Given


@dataclass(frozen=True, eq=False)
class Guide:
    """Who guides: ``self``, the pruned model in a pass without the program, or a second model (a
    :class:`~vlm.models.base.BaseVlm`) that takes the same inputs and makes as many visual tokens of them.

    In a recipe ``self``, or the hub name or folder of the second model, which is loaded when the program is made. In
    Python a model can be given as it is: ``Guide(load_pretrained(folder))``.
    """

    model: Any = None
    name: str = ""

    @classmethod
    def parse(cls, value: Any) -> "Guide":
        """Read a recipe value. Raises ValueError for what is no text."""
        if isinstance(value, Guide):
            return value
        if not isinstance(value, str) or not value:
            raise ValueError(f"expected self, or the hub name or folder of a small model; found {value!r}")
        return SELF if value == "self" else cls(name=value)

    def __str__(self) -> str:
        return self.name or ("self" if self.model is None else type(self.model).__name__)

    def of(self, facts: Facts, who: str) -> "Guide":
        """The guide with its model, for a model of these facts.

        Raises ModelError when it cannot be loaded, or makes other visual tokens of an image.
        """
        guide = self
        if self.name and self.model is None:
            if facts.companion is None:
                raise ModelError(f"{who}: guide: expected a model that was built from a recipe, to load {self.name!r}")
            guide = Guide(facts.companion(self.name), self.name)
        if guide.model is not None:
            expected, found = facts.visual, guide.model.facts.visual
            if expected is not None and found is not None and expected != found:
                raise ModelError(
                    f"{who}: guide {guide}: expected the model's {expected} visual tokens of an image; found {found}"
                )
        return guide

    def beside(self, model: Any, inputs: Any) -> Any:
        """The model that guides ``model`` in a pass over ``inputs``, on their device."""
        if self.model is None:
            return model
        if next(self.model.parameters()).device != inputs.tokens.device:
            self.model.to(inputs.tokens.device)
        return self.model


SELF = Guide()
FEW = Budget(ratio=0.05)  # for the consistency of an answer, as in the paper


class _Mass:
    """Adds up the attention that visual tokens get, over layers and heads."""

    def __init__(self, last_visual: bool) -> None:
        self.last_visual = last_visual
        self.total: Float[Tensor, "batch visual"] | None = None
        self.weight: Float[Tensor, " batch"] | None = None  # of the rows of a generated token; None in the prompt
        self._layout: Layout | None = None  # of the layers that came last, all of which have the same
        self._rows = self._place = self._valid = torch.empty(0)

    def __call__(self, layer: int, seen: Attention) -> None:
        if seen.layout is not self._layout:
            self._look(seen)
        got = seen.received(self._rows, None if self.weight is None else self.weight[:, None].to(seen.q.dtype))
        mass = got.sum(1).gather(1, self._place).masked_fill(~self._valid, 0)
        self.total = mass if self.total is None else self.total + mass

    def _look(self, seen: Attention) -> None:
        """Find the rows that have a say and the visual tokens: once for all layers, as it waits for the device."""
        assert seen.layout is not None
        self._layout = seen.layout
        self._place, self._valid = compact(seen.layout.visual, "right")
        if self.weight is not None:
            self._rows = torch.full_like(self._place[:, :1], seen.k.shape[2] - 1)
            return
        self._rows = seen.places("text")
        if self.last_visual:
            self._rows = torch.cat([self._rows, seen.layout.last(seen.layout.visual)[:, None]], 1)


def visual_importance(
    model: Any,
    inputs: Any,
    weights: Float[Tensor, "batch length"] | None = None,
    *,
    generated: int = 0,
    stop: int = -1,
    last_visual: bool = False,
) -> Float[Tensor, "batch visual"]:
    """How much attention each visual token gets from the question and, if asked, from an answer, summed over layers,
    heads and rows: those of each row in order, padded on the right.

    The question is the text after the last image. generated: tokens of a greedy answer whose rows count too, up to
    ``stop`` (a token id; -1: none). weights: of a training pass, whose answers then have no say. last_visual: the last
    visual token's own row counts too, as in the released code, which slices one place too early.

    Raises ModelError when an answer is asked for in a training pass, which has no prompt to continue.
    """
    if weights is not None and generated:
        raise ModelError(f"sgl: in training there is no prompt to continue; expected generated 0, found {generated}")
    mass = _Mass(last_visual)
    with torch.no_grad(), observe(model, mass):
        if not generated:
            model(inputs, weights)
        else:
            logits, stream = model.prefill(inputs)
            alive = torch.ones_like(logits[:, 0], dtype=torch.bool)
            for _ in range(generated):
                token = logits.argmax(-1)
                alive = alive & (token != stop)
                if not bool(alive.any()):
                    break
                mass.weight = alive.to(logits.dtype)
                logits = model.step(stream, token)
    assert mass.total is not None
    return mass.total


def importance_signal(guide: Guide, **options: Any) -> Given:
    """:func:`visual_importance` by a guide, as a signal of the model that it guides."""

    def scores(model: Any, inputs: Any, weights: Tensor | None) -> Float[Tensor, "batch visual"]:
        return visual_importance(guide.beside(model, inputs), inputs, weights, **options)

    own = guide.model is None
    alone = own and not options.get("generated")  # the pass itself says it all
    watch = partial(_Mass, bool(options.get("last_visual"))) if alone else None
    return Given(scores=scores, observes=own, watch=watch)


class Draft(NamedTuple):
    """Answers of a small model, and whether they are good enough that no larger one need be asked.

    confidence: geometric mean of the probabilities of its tokens. consistency: the probability of the same answer when
    only few visual tokens are left. exits: their mean is above the threshold. importance: of the visual tokens, for a
    larger model that is guided.
    """

    answers: list[list[int]]
    confidence: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]
    exits: Bool[Tensor, " batch"]
    importance: Float[Tensor, "batch visual"]


@torch.inference_mode()
def draft(
    model: Any,
    inputs: Any,
    *,
    threshold: float,
    max_new_tokens: int,
    stop: int,
    keep: Budget = FEW,
    last_visual: bool = False,
) -> Draft:
    """Answer with a small model and judge the answers (SGL's early exit).

    keep: visual tokens left for the consistency, the most important ones, before the language model. last_visual: as
    for :func:`visual_importance`. An answer without a token never exits. Probabilities are those of the answer's
    tokens, not of the token that ends it. Source: SGL (CVPR 2025), section 3.3.
    """
    answers = generate(model, inputs, max_new_tokens=max_new_tokens, stop=stop)
    length = torch.tensor([len(answer) for answer in answers], device=inputs.tokens.device)
    importance = visual_importance(model, inputs, generated=int(length.max()), stop=stop, last_visual=last_visual)
    confidence = (log_likelihood(model, inputs, answers) / length.clamp_min(1)).exp()
    given = Given(scores=lambda model, inputs, weights: importance)
    with attach(model, cut(model.facts, LLM_IN, keep, top_by(given), "keep")):
        consistency = log_likelihood(model, inputs, answers).exp()
    exits = ((confidence + consistency) / 2 > threshold) & (length > 0)
    return Draft(answers, confidence, consistency, exits, importance)


class FirstAnswers:
    """The early exit as an op: the guide answers first, and its attention while it did is not asked for again where the
    model has to answer after all.

    options: those of :func:`visual_importance`, for passes that answer nothing (training, contexts, measurements).
    """

    def __init__(self, guide: Guide, threshold: float, keep: Budget, *, last_visual: bool, **options: Any) -> None:
        self.guide, self.threshold, self.keep = guide, threshold, keep
        self.last_visual, self.options = last_visual, options
        self._drafted: Float[Tensor, "batch visual"] | None = None
        self._passed: tuple[Any, Float[Tensor, "left visual"]] | None = None

    @property
    def signal(self) -> Given:
        return Given(scores=self._scores)

    @property
    def program(self) -> Program:
        return ((DECODE, Cascade(self._answer, self._pass_on)),)

    def _answer(self, inputs: Any, max_new_tokens: int, stop: int) -> Answered:
        found = draft(
            self.guide.beside(None, inputs),
            inputs,
            threshold=self.threshold,
            max_new_tokens=max_new_tokens,
            stop=stop,
            keep=self.keep,
            last_visual=self.last_visual,
        )
        self._drafted = found.importance
        return Answered(found.answers, found.exits)

    def _pass_on(self, inputs: Any, rows: Int[Tensor, " left"]) -> None:
        assert self._drafted is not None  # an answer came before
        importance, self._drafted = self._drafted[rows], None
        most = int(self.guide.model.visual_counts(inputs).max())
        self._passed = (inputs, importance[:, :most])

    def _scores(self, model: Any, inputs: Any, weights: Tensor | None) -> Float[Tensor, "batch visual"]:
        passed, self._passed = self._passed, None
        if passed is not None and passed[0] is inputs:
            return passed[1]
        guide = self.guide.beside(model, inputs)
        return visual_importance(guide, inputs, weights, last_visual=self.last_visual, **self.options)


@torch.inference_mode()
def log_likelihood(model: Any, inputs: Any, answers: list[list[int]]) -> Float[Tensor, " batch"]:
    """Log probability of each answer after its prompt, under whatever program is attached; 0 of an empty one."""
    logits, stream = model.prefill(inputs)
    device = logits.device
    total = torch.zeros(len(answers), device=device, dtype=torch.promote_types(logits.dtype, torch.float32))
    longest = max(map(len, answers), default=0)
    for step in range(longest):
        token: Int[Tensor, " batch"] = torch.tensor([a[step] if step < len(a) else 0 for a in answers], device=device)
        real = torch.tensor([step < len(answer) for answer in answers], device=device)
        likely = logits.to(total.dtype).log_softmax(-1).gather(1, token[:, None])[:, 0]
        total = total + torch.where(real, likely, 0)
        if step < longest - 1:
            logits = model.step(stream, token)
    return total
