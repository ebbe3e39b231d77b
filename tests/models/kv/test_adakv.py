"""AdaKV against its procedure on dense attention: heads of a layer compete for its budget."""

import pytest

from vlm.models.kv.adakv import Adakv
from vlm.models.program.budget import Budget

ROWS = ("tt#ttt", "t#t#tt", "#tttttttt")


def pooled_by_hand(layer, smooth, n, window):
    paid = layer.paid(slice(n - window, n)) / window
    return [smooth(paid[h], n - window, 7, "max") for h in range(2)]


@pytest.mark.parametrize("normalise", [False, True])
def test_without_a_floor_the_best_of_all_heads_stay(make_model, batch, dense, kept, smooth, normalise):
    model, inputs = make_model(), batch(*ROWS)
    uneven = 0
    for b, n in enumerate((41, 76, 44)):
        capacity = round(0.3 * n)
        window = min(4, capacity // 2)
        found = kept(model, inputs, Adakv(Budget.parse("30%"), floor=0, normalise=normalise, window=4), b)
        for number, layer in enumerate(dense(model, inputs, b)):
            scores, base = pooled_by_hand(layer, smooth, n, window), capacity - window
            weights = [sum(sorted(s, reverse=True)[:base]) / sum(s) if normalise else 1 for s in scores]
            weighed = [(-s * weights[h], h, t) for h in range(2) for t, s in enumerate(scores[h])]
            chosen = sorted(weighed)[: 2 * base]
            counts = [sum(h == mine for _, h, _ in chosen) for mine in range(2)]
            assert [len(head) - window for head in found[number]] == counts
            for h in range(2):
                mine = sorted(range(n - window), key=lambda t, s=scores[h]: (-s[t], t))[: counts[h]]
                assert found[number][h] == [*sorted(mine), *range(n - window, n)]
            uneven += counts[0] != counts[1]
    assert uneven > 6


def test_the_floor_moves_heads_towards_the_same(make_model, batch, kept):
    model, inputs = make_model(), batch("t#t#tt")
    spread = []
    for floor in (0.0, 0.5, 1.0):
        found = kept(model, inputs, Adakv(Budget.parse(20), floor=floor))
        assert all(len(layer[0]) + len(layer[1]) == 40 for layer in found)
        spread.append(sum(abs(len(layer[0]) - len(layer[1])) for layer in found))
    assert spread[0] > spread[1] > spread[2] == 0
