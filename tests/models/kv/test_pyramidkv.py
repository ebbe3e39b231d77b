"""PyramidKV: SnapKV's choice on dense attention, with the code's list of budgets."""

import pytest

from vlm.models.kv.pyramidkv import Pyramidkv
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.fastv import Fastv


def test_the_choice(make_model, batch, dense, kept, best, smooth):
    # 76 entries, a budget of 24 and a window of 4: 20 before it on average, 20 // 20 at least, 39 at most, and so
    # 39, 27, 15, 3 in whole steps of 38 // 3, which are 84 for a budget of 80. 44 entries: 10 on average, 20, 14, 8, 2.
    model, inputs = make_model(), batch("t#t#tt", "#tttttttt")
    assert [Budget.parse("31%").of(n) for n in (76, 44)] == [24, 14]
    method = Pyramidkv(Budget.parse("31%"), window=4)
    for b, (n, before) in enumerate([(76, [39, 27, 15, 3]), (44, [20, 14, 8, 2])]):
        total = 4 * (Budget.parse("31%").of(n) - 4)
        exact = [total * c / sum(before) for c in before]
        found = kept(model, inputs, method, b)
        counts = [len(layer[0]) - 4 for layer in found]
        assert sum(counts) == total
        assert all(abs(count - wish) < 1 for count, wish in zip(counts, exact, strict=True))
        for number, layer in enumerate(dense(model, inputs, b)):
            score = layer.paid(slice(n - 4, n))
            for h in range(2):
                chosen = best(smooth(score[h], n - 4, 5), range(n - 4), counts[number])
                assert found[number][h] == [*chosen, *range(n - 4, n)]


@pytest.mark.parametrize("slope", [1, 20])
def test_a_steep_pyramid_is_flat_without_a_slope(make_model, batch, kept, slope):
    found = kept(make_model(), batch("t#t#tt"), Pyramidkv(Budget.parse(20), slope=slope))
    counts = [len(layer[0]) for layer in found]
    assert counts == sorted(counts, reverse=True)
    assert (counts == [20] * 4) == (slope == 1)


def test_after_a_cut_the_shorter_layers_have_smaller_budgets(make_model, batch):
    model, inputs = make_model(), batch("t#t#tt")
    cut = Fastv(Budget.parse("25%")).program(model.facts)  # 76 entries, 22 from layer 2 on
    with attach(model, cut + Pyramidkv(Budget.parse("50%")).program(model.facts)):
        _, stream = model.prefill(inputs)
    counts = stream.run.cached_tokens(4)
    assert sum(counts) == 2 * 38 + 2 * 11
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert counts[2] <= 22
