"""Calibration by trying: how well a model answers under a program, head by head."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.models.program.attach import attach
from vlm.models.program.program import Program

Objective = Literal["accuracy", "entropy"]


class Asked(NamedTuple):
    """Prompts and the token that each answer begins with."""

    inputs: Any
    answer: Int[Tensor, " batch"]


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
    tick: Callable[[], None] = lambda: None,
) -> Float[Tensor, "layers heads"]:
    """For every head alone the value that scores best, ``neutral`` where none is better than the bare model; the first
    of several. program_at(layer, head, value) changes that head only. Costs a pass for each head and value."""
    config = model.decoder.config
    best = torch.full((config.num_hidden_layers, config.num_attention_heads), neutral)
    bare = answer_score(model, asked, (), objective)
    for layer in layers:
        for head in range(best.shape[1]):
            top = bare
            for value in values:
                score = answer_score(model, asked, program_at(layer, head, value), objective)
                if score > top:
                    top, best[layer, head] = score, value
            tick()
    return best
