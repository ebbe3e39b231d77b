"""What a vision encoder's attention says about the visual tokens that the language model gets."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.observe import resting
from vlm.models.program.program import VIT_OUT, Select, Selector, Tokens
from vlm.models.program.segments import ranks
from vlm.models.program.signals import Facts, Given, Signal, encoder_of
from vlm.models.program.vision import VisionEngine

OfGrids = Callable[[Sequence[Float[Tensor, "images tokens"]]], Float[Tensor, "images tokens"]]


def patch_scores(facts: Facts, who: str, signals: Sequence[Signal], score: OfGrids) -> Given:
    """Scores of visual tokens from attention in the vision encoder, as a signal of the language model.

    signals: each [images, heads, patches]; their sums over heads, and means over the patches of a visual token, are
    handed to ``score``. Read in a pass of the uncut encoder before each prompt, so that a cut there changes nothing but
    which tokens are left to have a score.

    Raises ModelError where programs cannot see the encoder, or where an image is shown in several views.
    """
    encoder_of(facts, who)
    if facts.visual is None:
        raise ModelError(
            f"{who}: it ranks the patches of one view of an image; found a model that shows it in tiles "
            "or in a shape of its own"
        )

    def scores(model: Any, inputs: Any, weights: Tensor | None) -> Float[Tensor, "batch visual"]:
        seen: list[Tensor] = []
        found, grids, total = _encoded(model, inputs, signals, seen)
        if found is None:
            return torch.zeros(len(total), 0, device=inputs.tokens.device)
        tokens = [_on_grid(attention.sum(1), model.vision.grid, grids[0], who) for attention in found]
        flat, out = score(tokens).flatten(), tokens[0].new_zeros(len(total), int(total.max()))
        mine = torch.arange(out.shape[1], device=out.device) < total[:, None]
        return out.masked_scatter(mine, flat)  # images come in the order of their places

    return Given(scores=scores, observes=True)


def _encoded(model: Any, inputs: Any, signals: Sequence[Signal], seen: list[Tensor]) -> tuple[Any, Any, Tensor]:
    """The signals of a pass of the bare encoder (None without an image), each image's grid of visual tokens, and how
    many of them each row has."""

    def choose(tokens: Tokens, count: Tensor) -> Bool[Tensor, "images patches"]:
        seen.extend(tokens.signal(signal) for signal in signals)
        return tokens.valid

    look = Select(Budget(ratio=1.0), Selector(choose, tuple(signals)), exact=False)
    with resting(model):
        engine = VisionEngine(model.vision, ((VIT_OUT, look),), model.facts.layers, "auto")
        model.engine.vision = engine  # resting() puts the program's own back
        handles = engine.hook()
        try:
            _, run = model._enter(inputs, None)
        finally:
            for handle in handles:
                handle.remove()
    return seen or None, run.grids, run.total


def _on_grid(
    patches: Float[Tensor, "images patches"], patch_grid: tuple[int, int], grid: tuple[int, int], who: str
) -> Float[Tensor, "images tokens"]:
    """The mean over the patches of each visual token. Raises ModelError for a connector whose tokens are no blocks."""
    if patch_grid == grid:
        return patches
    down, across = patch_grid[0] // grid[0], patch_grid[1] // grid[1]
    if (grid[0] * down, grid[1] * across) != patch_grid:
        raise ModelError(f"{who}: expected visual tokens that are blocks of patches; found {patch_grid} to {grid}")
    blocks = patches.view(len(patches), grid[0], down, grid[1], across)
    return blocks.mean((2, 4)).flatten(1)


def top_share(score: Float[Tensor, "images tokens"], part: float) -> Bool[Tensor, "images tokens"]:
    """The given share of each image's tokens, rounded down, with the largest score."""
    return ranks(score, torch.ones_like(score, dtype=torch.bool)) < int(part * score.shape[1])


def outliers(score: Float[Tensor, "images tokens"], width: float = 1.5) -> Bool[Tensor, "images tokens"]:
    """Tokens whose score lies above the third quartile by more than ``width`` interquartile ranges (Tukey's fence)."""
    wide = score if score.dtype == torch.float64 else score.float()
    low, high = wide.quantile(torch.tensor([0.25, 0.75], dtype=wide.dtype, device=wide.device), dim=1, keepdim=True)
    return wide > high + width * (high - low)
