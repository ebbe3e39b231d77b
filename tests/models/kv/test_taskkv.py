"""Task-KV against its procedure on dense attention: the head that means something else stays whole."""

import pytest
import torch

from vlm.models.kv.taskkv import Taskkv
from vlm.models.program.budget import Budget


@pytest.mark.parametrize("keep", ["45%", "80%"])
def test_the_choice(make_model, batch, dense, kept, best, smooth, keep):
    model, inputs = make_model(kv_heads=4), batch("t#t#tt", "tt#ttt")
    method = Taskkv(Budget.parse(keep), share=0.5, least=1, rows=8, best=12, sinks=3, recent=5)
    capacity = Budget.parse(keep).of(76)
    found = kept(model, inputs, method, 0, 4)
    for number, layer in enumerate(dense(model, inputs)):
        paid = layer.attention[:, -8:].sum(1)
        meaning = torch.stack([paid[h, i] @ layer.v[h, i] for h in range(4) for i in [paid[h].topk(12).indices]])
        far = (meaning - meaning.mean(0)).norm(dim=1).argsort(descending=True).tolist()
        whole = [2, 1, 1, 1][number]  # 2 - number / 3
        while whole * 76 + (4 - whole) * 8 > 4 * capacity:
            whole -= 1
        middle = (4 * capacity - whole * 76) // (4 - whole) - 8
        for h in range(4):
            if h in far[:whole]:
                assert found[number][h] == list(range(76))
                continue
            mine = best(smooth(paid[h], 76, 5), range(3, 71), middle)
            assert found[number][h] == sorted([0, 1, 2, *mine, *range(71, 76)])


def test_where_the_budget_allows_for_no_whole_head_all_are_alike(make_model, batch, kept):
    model, inputs = make_model(kv_heads=4), batch("t#t#tt")
    for layer in kept(model, inputs, Taskkv(Budget.parse(12)), 0, 4):
        for head in layer:
            assert len(head) == 12
            assert head[:3] == [0, 1, 2]  # sinks: half of what the recent ones leave
            assert head[-6:] == list(range(70, 76))
