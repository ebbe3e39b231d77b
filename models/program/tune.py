"""Calibration by trying: how well a model answers under a program, head by head."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.program.attach import attach
from vlm.models.program.program import Program

Objective = Literal["accuracy", "entropy"]


Tick = Callable[[int, int], None]  # done, total


class Asked(NamedTuple):
    """Prompts and the token that each answer begins with."""

    inputs: Any
    answer: Int[Tensor, " batch"]


class Described(NamedTuple):
    """Prompts with an image each, what the data answer, and what they would answer if they made something up ("" where
    nobody can say)."""

    inputs: Any
    texts: Sequence[str]
    wrong: Sequence[str] = ()


class Judged(NamedTuple):
    """Prompts, the tokens that the model itself answers, and the number of each token that begins the name of an
    object, with whether the picture is known not to show it."""

    inputs: Any
    answers: Sequence[Sequence[int]]
    mentions: Sequence[Sequence[tuple[int, bool]]]


class Material(Protocol):
    """What calibrations may ask of the samples of a data source; each is made when it is asked for, in batches."""

    @property
    def asked(self) -> Sequence[Asked]: ...

    @property
    def described(self) -> Sequence[Described]: ...

    @property
    def captioned(self) -> Sequence[Described]: ...

    @property
    def judged(self) -> Sequence[Judged]: ...


@torch.no_grad()
def answer_score(model: Any, asked: Sequence[Asked], program: Program, objective: Objective) -> float:
    """How good the token after the prompts is under a program, mean over prompts; more is better. accuracy: how often
    it is the answer's first. entropy: minus the entropy of its distribution, in nats, which asks for no answers."""
    found = []
    for inputs, answer in asked:
        with attach(model, program):
            logits = model.prefill(inputs)[0].double()
        likely = logits.log_softmax(-1)
        right = (logits.argmax(-1) == answer).double()
        found.append(right if objective == "accuracy" else (likely.exp() * likely).sum(-1))
    return float(torch.cat(found).mean())


def best_by_head(
    model: Any,
    asked: Sequence[Asked],
    program_at: Callable[[int, int, float], Program],
    layers: Sequence[int],
    values: Sequence[float],
    neutral: float,
    objective: Objective,
    tick: Tick = lambda done, total: None,
) -> Float[Tensor, "layers heads"]:
    """For every head alone the value that scores best, ``neutral`` where none is better than the bare model; the first
    of several. program_at(layer, head, value) changes that head only. Costs a pass for each head and value."""
    config = model.decoder.config
    best = torch.full((config.num_hidden_layers, config.num_attention_heads), neutral)
    bare = answer_score(model, asked, (), objective)
    for number, layer in enumerate(layers):
        for head in range(best.shape[1]):
            top = bare
            for value in values:
                score = answer_score(model, asked, program_at(layer, head, value), objective)
                if score > top:
                    top, best[layer, head] = score, value
            tick(number * best.shape[1] + head + 1, len(layers) * best.shape[1])
    return best
