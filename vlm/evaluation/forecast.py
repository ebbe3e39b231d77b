"""What a prompt will cost under a program, told before anything runs: no weights, no image, no question.

The cuts of a program say how many visual tokens each layer works on. What a cache policy holds is found by running it
on a narrow decoder with random weights, of as many layers and key/value heads: policies divide a budget, and what the
budget is does not depend on what was attended to.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from vlm.evaluation.cost import prompt_cost
from vlm.evaluation.stand_in import GivenFeatures, prompt, stand_in
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.cache import Evict, EvictStep, ReadStep
from vlm.models.program.program import LLM_IN, Program, Rewrite, Select, Site, llm_before
from vlm.models.program.schedule import TEXT, BudgetReport, report
from vlm.models.program.select import even_stride
from vlm.models.program.shape import DecoderShape
from vlm.models.vision_language import VisionLanguageModel


class Forecast(NamedTuple):
    """The cost of one prompt with one image and 64 text tokens.

    main: of the stream that answers. flops, kv_bytes: of all decode streams. most: a selector decides itself how many
    tokens stay before the last cut (or at all), so that counts are what there can be at most.
    """

    main: BudgetReport
    flops: float
    kv_bytes: float
    most: bool


def forecast(program: Program, visual: int, decoder: DecoderShape) -> Forecast:
    """The cost of a prompt whose image has ``visual`` tokens before any cut."""
    per_layer, most = visual_per_layer(program, visual, decoder.layers)
    main = report(per_layer, TEXT, decoder, _held(program, per_layer, decoder))
    contexts = {context for _, op in program if isinstance(op, Rewrite) for context in op.streams}
    shown = [per_layer if context.image else [0] * decoder.layers for context in contexts]
    others = [report(counts, TEXT, decoder, _held(program, counts, decoder)) for counts in shown]
    streams = [main, *others]
    return Forecast(main, sum(s.flops for s in streams), sum(s.kv_bytes for s in streams), most)


def visual_per_layer(program: Program, visual: int, layers: int) -> tuple[list[int], bool]:
    """Visual tokens of an image in each decoder layer, and whether they can be fewer.

    A cut in or after the encoder acts before the first layer. Budgets are of the tokens before any cut. Where the
    selectors of a program decide themselves, only its last cut is bound to the budget.
    """
    cuts = [(_layer(site), op) for site, op in program if isinstance(op, Select)]
    last = cuts[-1][1] if cuts else None
    bound = [(at, op.keep.of(visual)) for at, op in cuts if op.exact or op is last]
    counts = [min([visual, *(count for at, count in bound if at <= layer)]) for layer in range(layers)]
    return counts, any(not op.exact and (op is last or at >= 0) for at, op in cuts)


def _layer(site: Site) -> int:
    """The decoder layer at whose input a cut acts; -1 in and after the encoder."""
    return -1 if site.name.startswith("vit.") else 0 if site == LLM_IN else site.layer


def _held(program: Program, visual: Sequence[int], decoder: DecoderShape) -> list[float] | None:
    """Entries of each key/value head in each layer's cache, None when the program leaves caches alone."""
    policy = tuple(pair for pair in program if isinstance(pair[1], Evict | EvictStep | ReadStep))
    if not policy:
        return None
    cuts = [(layer, after) for layer, (before, after) in enumerate(pairwise(visual), 1) if after < before]
    stride = tuple((llm_before(layer), Select(Budget(tokens=after), even_stride())) for layer, after in cuts)
    model, inputs = _narrow(decoder.layers, decoder.kv_heads, max(visual[0], 1)), prompt(TEXT)
    with attach(model, stride + policy):
        return prompt_cost(model, inputs if visual[0] else inputs.without_images())["kv_entries_per_layer"]


@lru_cache(maxsize=8)
def _narrow(layers: int, kv_heads: int, visual: int) -> VisionLanguageModel:
    """As many layers and heads as the real decoder has; what is counted depends on no width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = DecoderShape(layers, width=8 * kv_heads, mlp=16, kv_heads=kv_heads, head_dim=8)
        return stand_in(shape, GivenFeatures((1, visual)))
