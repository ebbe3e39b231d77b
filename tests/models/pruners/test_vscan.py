"""VScan in a model against loops over dense attention, its second cut, and the numbers of the official code."""

import pytest
import torch
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import VIT_OUT, llm_before
from vlm.models.program.signals import PatchAttention
from vlm.models.pruners.vscan import Vscan


def first_cut(by_eye, x, local, overall, keep, window=6, share=0.5):
    """Places and features of one image after windows, the best of the others, and averaging."""
    grid = [(p // 6, p % 6) for p in range(36)]
    windows = [[p for p in range(36) if (grid[p][0] // window, grid[p][1] // window) == w] for w in sorted(
        {(r // window, c // window) for r, c in grid}
    )]  # fmt: skip
    each = int(keep * share) // len(windows)
    kept = [p for own in windows for p in by_eye.best(local, each, own)]
    kept += by_eye.best(overall, keep - len(kept), [p for p in range(36) if p not in kept])
    kept.sort()
    alike = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    groups = {p: [p] for p in kept}
    for p in range(36):
        if p not in kept:
            groups[max(kept, key=lambda k, p=p: float(alike[p, k]))].append(p)
    return kept, torch.stack([x[groups[p]].mean(0) for p in kept])


@pytest.mark.parametrize(
    ("keep", "options"), [(9, {"window": 3}), (16, {"window": 2, "early": 1}), (7, {"local": 0.3})]
)
def test_the_first_cut_equals_loops_over_dense_attention(clear, batch, by_eye, keep, options):
    model, inputs, layouts = clear(), batch("t#t#", "#t"), []
    with torch.no_grad(), attach(model, Vscan(Budget(tokens=keep), language=False, **options).program(model.facts)):
        features = by_eye.handed_over(model, lambda: layouts.append(model(inputs).layout))
    seen = by_eye.look(model, inputs.images)
    early, late = seen.class_row(options.pop("early", 4 * 5 // 24)), seen.class_row()
    names = {"window": "window", "local": "share"}
    options = {names[name]: value for name, value in options.items()}
    for n in range(3):
        places, expected = first_cut(by_eye, seen.features[n], early[n], late[n], keep, **options)
        assert by_eye.places(layouts[0], n) == places and len(places) == keep
        torch.testing.assert_close(features[n], expected, rtol=0, atol=1e-9)


def test_the_second_cut_keeps_what_its_layer_would_attend_to_from_the_last_row(clear, batch, by_eye, by_hand):
    model, inputs = clear(), batch("tt#tt")
    budget, whole = Budget(tokens=5), Vscan(Budget(tokens=15), language=False)
    seen: list[Tensor] = []

    def edit(number: int, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
        if number == 2:
            seen.append(attention)
        return attention

    with torch.no_grad():
        with attach(model, whole.program(model.facts)):
            layout = model(inputs).layout
            embeds, _ = model._enter(inputs, side=None)
        by_hand(model, embeds[0], edit=edit)
        with attach(model, Vscan(budget).program(model.facts)):
            out, (_, stream) = model(inputs), model.prefill(inputs)
    last = seen[0].mean(0)[-1]  # of layer 2, without any cut before it
    visual = layout.visual[0].nonzero().flatten().tolist()
    kept = sorted(by_eye.best(last, 5, visual))
    both = layout.row[0, kept] * 6 + layout.col[0, kept]
    assert by_eye.places(out.layout, 0) == both.tolist()
    assert stream.run.visual_tokens(4) == [15, 15, 5, 5]


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        ("25%", [27, 27, 9, 9]),
        (4, [12, 12, 4, 4]),
        ("50%", [36, 36, 18, 18]),  # there are not three times as many
        ({"average": 16}, [24, 24, 8, 8]),  # 1.5 and 0.5 times the budget, as in the paper
        ({"after_layer": 12}, [12, 12, 4, 4]),
    ],
)
def test_the_budget_is_what_is_left_in_the_end(clear, batch, keep, layers):
    model, inputs = clear(), batch("tt#tt", "#t")
    with torch.no_grad(), attach(model, Vscan(Budget.parse(keep)).program(model.facts)):
        assert model.prefill(inputs)[1].run.visual_tokens(4) == layers


def test_windows_give_the_choice_of_the_official_code(clear, by_eye, positive, golden):
    local, overall = positive(61, 1, 576)[None], positive(61, 1, 576).flip(1)[None]
    program = Vscan(Budget(tokens=96), language=False).program(clear().facts)
    signals = {PatchAttention(0, "class"): local, PatchAttention(3, "class"): overall}
    kept, _ = by_eye.apply(program, by_eye.given(torch.randn(1, 576, 4), signals.__getitem__, columns=24))
    rest = by_eye.best(overall[0, 0], 48, [p for p in range(576) if p not in golden["vscan_local_48"]])
    assert kept[0].nonzero().flatten().tolist() == sorted(golden["vscan_local_48"] + rest)


def test_defaults_are_those_of_the_paper(clear):
    facts = clear().facts
    big = facts._replace(layers=32, vision=facts.vision._replace(depth=24, blocks=23, output=22))
    big = big._replace(visual=576, shape=None)
    (first, cut), (second, inside) = Vscan(Budget(tokens=32)).program(big)
    assert (first, second) == (VIT_OUT, llm_before(16))
    assert (cut.keep.tokens, inside.keep.tokens) == (96, 32)
    assert cut.selector.needs == (PatchAttention(5, "class"), PatchAttention(22, "class"))


def test_bad_input(clear, needs_class_token):
    needs_class_token(Vscan, "vscan", "early")
    model = clear()
    with pytest.raises(ModelError) as error, attach(model, Vscan(Budget(tokens=9), layer=4).program(model.facts)):
        pass
    assert str(error.value) == "llm.before[4]: the language model has layers 1..3; found 4"
