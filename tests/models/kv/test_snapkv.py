"""SnapKV against its procedure on dense attention, row by row of a padded batch."""

import pytest

from vlm.models.kv.snapkv import Snapkv
from vlm.models.program.budget import Budget

ROWS = ("tt#ttt", "t#t#tt", "#tttttttt")


@pytest.mark.parametrize(("kernel", "how", "heads"), [(5, "mean", "mean"), (7, "max", "mean"), (3, "mean", "max")])
def test_the_choice(make_model, batch, dense, kept, best, smooth, kernel, how, heads):
    model, inputs = make_model(), batch(*ROWS)
    method = Snapkv(Budget.parse("30%"), 8, kernel, how, heads)
    for b, n in enumerate((41, 76, 44)):
        capacity = round(0.3 * n)
        window = min(8, capacity // 2)
        found = kept(model, inputs, method, b)
        for number, layer in enumerate(dense(model, inputs, b)):
            by_query = layer.attention[:, -window:].sum(1)
            for h in range(2):
                group = by_query[2 * h : 2 * h + 2]
                score = group.mean(0) if heads == "mean" else group.max(0).values
                chosen = best(smooth(score, n - window, kernel, how), range(n - window), capacity - window)
                assert found[number][h] == [*chosen, *range(n - window, n)]


def test_other_families_and_every_head_a_key_of_its_own(make_model, batch, dense, kept, best, smooth):
    model, inputs = make_model("qwen2", kv_heads=4), batch("t#ttt", "tt#t")
    found = kept(model, inputs, Snapkv(Budget.parse(10)), 0, 4)
    for number, layer in enumerate(dense(model, inputs)):
        for h in range(4):
            chosen = best(smooth(layer.attention[h, -5:].sum(0), 35, 5), range(35), 5)
            assert found[number][h] == [*chosen, *range(35, 40)]
