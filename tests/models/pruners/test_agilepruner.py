"""AgilePruner in a model against loops over dense attention, and its two extremes."""

import math

import numpy
import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.agilepruner import Agilepruner


def erank(x, centre=False):
    values = numpy.linalg.svd((x - x.mean(0) if centre else x).numpy(), compute_uv=False)
    share = values / values.sum()
    return math.exp(-sum(s * math.log(s) for s in share if s > 0))


def by_hand(by_eye, x, score, keep, slope, largest=0.9, picked=False):
    """Places that stay of one image; slope: distance for each rank."""
    order = by_eye.best(score, len(score))
    apart = 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    alive, taken = list(order), []
    while alive and len(taken) < keep:
        token = alive.pop(0)
        taken.append(token)
        number = len(taken) if picked else order.index(token) + 1
        radius = min(largest, number * slope)
        alive = [other for other in alive if apart[token, other] >= radius]
    again = [token for token in order if token not in taken]
    return sorted(taken + again[: keep - len(taken)])


CASES = [
    (9, {"mean_rank": 5.0}),
    (14, {"mean_rank": 3.0, "centre": True}),
    (8, {"mean_rank": 2.0, "step": "picked"}),
    (12, {"mean_rank": 1.0, "largest": 0.3, "layer": 1}),
]


@pytest.mark.parametrize(("keep", "options"), CASES)
def test_equals_loops_over_dense_attention(clear, batch, by_eye, keep, options):
    model, inputs = clear(), batch("t#t#", "#t")
    with attach(model, Agilepruner(Budget(tokens=keep), **options).program(model.facts)):
        layout = model(inputs).layout
    seen = by_eye.look(model, inputs.images)
    score = seen.class_row(options.get("layer", 3))
    attention_alone = []
    for n in range(3):
        x = seen.features[n]
        slope = 0.01 * erank(x, options.get("centre", False)) / options["mean_rank"]
        picked = options.get("step") == "picked"
        expected = by_hand(by_eye, x, score[n], keep, slope, options.get("largest", 0.9), picked)
        assert by_eye.places(layout, n) == expected and len(expected) == keep
        attention_alone.append(expected == sorted(by_eye.best(score[n], keep)))
    assert not all(attention_alone)


def test_without_a_slope_it_is_attention_alone(clear, batch, by_eye):
    model, inputs = clear(), batch("t#t#", "#t")
    with attach(model, Agilepruner(Budget(tokens=9), slope=0.0).program(model.facts)):
        layout = model(inputs).layout
    score = by_eye.look(model, inputs.images).class_row()
    assert [by_eye.places(layout, n) for n in range(3)] == [sorted(by_eye.best(score[n], 9)) for n in range(3)]


def test_a_richer_image_strikes_out_more(clear, by_eye):
    [(_, op)] = Agilepruner(Budget(tokens=3), mean_rank=4.0, slope=0.05).program(clear().facts)
    attention = torch.linspace(1, 0.1, 12)[None, None]
    g = torch.Generator().manual_seed(0)
    rich = torch.randn(1, 12, 8, generator=g)
    poor = rich[..., :1] * torch.randn(1, 1, 8, generator=g) + 0.02 * rich
    counts = []
    for x in (poor, rich):
        kept = op.selector.choose(by_eye.given(x, lambda signal: attention), torch.tensor([3]))
        slope = 0.05 * erank(x[0]) / 4
        counts.append(slope)
        assert kept[0].nonzero().flatten().tolist() == by_hand(by_eye, x[0], attention[0, 0], 3, slope)
    assert counts[0] < counts[1]


def test_bad_input(clear, needs_class_token):
    needs_class_token(Agilepruner, "agilepruner")
    with pytest.raises(ModelError) as error:
        Agilepruner(Budget(tokens=9), mean_rank=0).program(clear().facts)
    assert str(error.value) == "agilepruner: expected mean_rank above 0 and slope of at least 0; found 0, 0.01"
