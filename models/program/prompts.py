"""The words of prompts: where they stand, and what a method's own words are for the model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.signals import Facts


def words(facts: Facts, option: str, text: str, tokens: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids of a method's own words; ``tokens`` where a user gives ids instead.

    option: what an error calls the text. Raises ModelError for a model without its tokenizer, and for no words.
    """
    if not tokens and facts.tokenize is None:
        ids = f"{option.partition('.')[0]}.tokens"
        raise ModelError(f"{option}: this model comes without its tokenizer; give ids as {ids}, or set model.tokenize")
    found = tuple(tokens) or tuple(facts.tokenize(text) if facts.tokenize is not None else ())
    if not found:
        raise ModelError(f"{option}: expected words; found {text!r}, which is no token")
    return found


def last_place(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
    """Index of the last place of each row where ``mask`` holds, -1 where there is none."""
    place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * place).amax(1) - 1


def asked(inputs: Any, closing: Sequence[int] | int) -> Bool[Tensor, "batch length"]:
    """The words after the last image of each prompt, as far as they are the user's; none in a row without an image.

    closing: the tokens with which the template lets every prompt end, or how many they are. As many of them as a prompt
    really ends with are the template's.
    """
    place = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
    image = last_place(inputs.visual)[:, None]
    end = last_place(inputs.valid)[:, None] + 1
    for row, last in enumerate(end[:, 0].tolist()):
        end[row] -= closing if isinstance(closing, int) else _alike(inputs.tokens[row, :last].tolist(), closing)
    return inputs.valid & (image >= 0) & (place > image) & (place < end)


def _alike(text: Sequence[int], closing: Sequence[int]) -> int:
    """How many tokens both end with alike."""
    pairs = zip(reversed(text), reversed(closing), strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), min(len(text), len(closing)))


def closing_of(model: Any, count: int | None, option: str) -> Sequence[int] | int:
    """The tokens with which a template lets every prompt end, as ``model.closing`` tells, or their ``count`` where a
    user gives it. Raises ModelError where nobody says."""
    if count is not None:
        return count
    if model.closing is None:
        raise ModelError(
            f"{option}: nobody told this model how its prompts end (model.closing); give the number of tokens that the "
            "template has after the question"
        )
    return model.closing()
