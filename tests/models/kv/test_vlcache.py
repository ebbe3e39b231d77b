"""VL-Cache against its procedure on dense attention."""

import pytest
import torch

from vlm.models.kv.vlcache import Vlcache
from vlm.models.program import kv_signals
from vlm.models.program.budget import Budget

ROWS = ("tt#ttt", "t#t#ttttttt", "#tttttttt")


def density(attention, first):
    """Of the entries that the rows from ``first`` on see, those with a hundredth of the row's largest attention."""
    dense, seen = 0.0, 0
    for row in range(first, attention.shape[1]):
        for head in attention:
            dense += int((head[row, : row + 1] >= 0.01 * head[row, : row + 1].max()).sum()) / len(attention)
        seen += row + 1
    return dense / seen


@pytest.mark.parametrize("chunk", [64, 2])
def test_the_choice(make_model, batch, dense, kept, best, chunk, monkeypatch):
    monkeypatch.setattr(kv_signals, "CHUNK", chunk)
    model, inputs = make_model(), batch(*ROWS)
    counted = []
    for b, (n, first) in enumerate([(41, 38), (81, 74), (44, 36)]):
        layers, found = dense(model, inputs, b), kept(model, inputs, Vlcache(Budget.parse("30%")), b)
        densities = [density(layer.attention, first) for layer in layers]
        share = [d / sum(densities) * 4 * Budget.parse("30%").of(n) / n for d in densities]
        for number, layer in enumerate(layers):
            count = int(share[number] * n)
            window = int(0.1 * count)
            score = layer.paid(slice(first, n))
            for h in range(2):
                mine = best(score[h], range(n - window), count - window)
                assert found[number][h] == [*mine, *range(n - window, n)]
            counted.append(count)
    assert len(set(counted[:4])) > 1  # layers do differ


def test_a_dense_layer_keeps_at_most_the_prompt(make_model, batch, kept):
    model, inputs = make_model(), batch("tt#ttt")
    with torch.no_grad():
        for layer in (0, 1, 2):  # almost one-hot attention, and even attention in the last
            model.decoder.layers[layer].self_attn.q_proj.weight *= 30
        model.decoder.layers[3].self_attn.q_proj.weight *= 0
    counts = [len(layer[0]) for layer in kept(model, inputs, Vlcache(Budget.parse("60%")))]
    assert counts[3] == 41
    assert max(counts[:3]) < 20
