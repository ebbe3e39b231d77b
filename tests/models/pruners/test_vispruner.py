"""VisPruner in a model against loops over dense attention, and on the numbers of the official code."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.vispruner import Vispruner


def by_hand(by_eye, x, score, keep, ratio=0.5, step=8):
    """Places that stay of one image: [patches, width] features and a score each."""
    order = by_eye.best(score, len(score))
    important = order[: int(keep * ratio)]
    left = order[len(important) :]
    alike = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    while len(left) > keep - len(important):
        evens, odds = left[0::2], left[1::2]
        nearest = {a: float(alike[a, odds].max()) for a in evens}
        evens.sort(key=lambda a: -nearest[a])
        left = evens[min(step, len(left) - (keep - len(important)), len(evens)) :] + odds
    return sorted(important + left)


@pytest.mark.parametrize(("keep", "options"), [(9, {}), (14, {"ratio": 0.25, "step": 2}), (7, {"layer": 1})])
def test_equals_loops_over_dense_attention(clear, batch, by_eye, keep, options):
    model, inputs = clear(), batch("t#t#", "#t")
    with attach(model, Vispruner(Budget(tokens=keep), **options).program(model.facts)):
        layout = model(inputs).layout
    seen = by_eye.look(model, inputs.images)
    score = seen.class_row(options.pop("layer", 3))
    expected = [by_hand(by_eye, seen.features[n], score[n], keep, **options) for n in range(3)]
    assert [by_eye.places(layout, n) for n in range(3)] == expected
    assert len({*map(tuple, expected)}) == 3  # different images, different choices


def test_ratio_1_is_fastervlm_and_received_needs_no_class_token(clear, batch, by_eye):
    for model, options in ((clear(), {}), (clear(class_token=False), {"attention": "received"})):
        inputs = batch("t#t#", "#t")
        with attach(model, Vispruner(Budget(tokens=8), ratio=1, **options).program(model.facts)):
            layout = model(inputs).layout
        seen = by_eye.look(model, inputs.images)
        score = seen.received() if options else seen.class_row()
        for n in range(3):
            assert by_eye.places(layout, n) == sorted(by_eye.best(score[n], 8))


def test_gives_the_choice_of_the_official_code(clear, by_eye, signed, positive, golden):
    program = Vispruner(Budget(tokens=16)).program(clear().facts)
    attention = positive(42, 1, 4, 64)
    kept, _ = by_eye.apply(program, by_eye.given(signed(41, 1, 64, 16), lambda signal: attention))
    assert kept[0].nonzero().flatten().tolist() == golden["vispruner"]["16_0.5"]


def test_bad_input(clear, needs_class_token):
    needs_class_token(Vispruner, "vispruner")
    for options, found in (({"ratio": 1.5}, "1.5, 8"), ({"step": 0}, "0.5, 0")):
        with pytest.raises(ModelError) as error:
            Vispruner(Budget(tokens=9), **options).program(clear().facts)
        assert str(error.value) == f"vispruner: expected ratio in 0..1 and step of at least 1; found {found}"
