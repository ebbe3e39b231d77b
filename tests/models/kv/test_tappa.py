"""TAPPA against its procedure on dense attention: budgets by how much queries move, scores by mean and variance."""

import pytest
import torch

from vlm.models.kv.tappa import Tappa
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.fastv import Fastv

ROWS = ("tt#ttt", "t#t#tt", "tttttttttt")


def movement(q):
    unit = torch.nn.functional.normalize(q[:, -32:], dim=2)  # [H,R,d]
    rows = unit.shape[1]
    cosines = [
        float(unit[h, i] @ unit[h, j]) for h in range(len(q)) for i in range(rows) for j in range(rows) if i != j
    ]
    return 1 - sum(cosines) / len(cosines)


@pytest.mark.parametrize("variance", [200.0, 0.0])
def test_the_choice(make_model, batch, dense, kept, best, smooth, variance):
    model, inputs = make_model(), batch(*ROWS)
    method = Tappa(Budget.parse("30%"), variance=variance, window=6)
    for b, n in enumerate((41, 76, 10)):
        capacity = round(0.3 * n)
        window = min(6, max(capacity // 2, 1))
        layers, found = dense(model, inputs, b), kept(model, inputs, method, b)
        moves, total = [movement(layer.q) for layer in layers], 4 * (capacity - window)
        counts = [min(int(total * m / sum(moves)), n - window) for m in moves]
        lengths = [len(layer[0]) - window for layer in found]
        assert sum(lengths) == total
        assert all(0 <= found - count <= 1 for found, count in zip(lengths, counts, strict=True))
        for number, layer in enumerate(layers):
            rows = layer.attention[:, n - window :]
            score = rows.mean(1)
            if window > 1:
                score = score + variance * rows.var(1)
            score = score.unflatten(0, (2, 2)).mean(1)
            for h in range(2):
                mine = best(smooth(score[h], n - window, 5), range(n - window), lengths[number])
                assert found[number][h] == [*mine, *range(n - window, n)]


def test_a_layer_whose_queries_stand_still_keeps_its_window(make_model, batch, kept):
    model, inputs = make_model("qwen2"), batch("tt#ttt")
    with torch.no_grad():
        model.decoder.layers[2].self_attn.q_proj.weight *= 0
        model.decoder.layers[2].self_attn.q_proj.bias.fill_(1)
    for inverse in model.decoder.rotary_emb.inv_freq, model.decoder.rotary_emb.original_inv_freq:
        inverse *= 0
    counts = [len(layer[0]) for layer in kept(model, inputs, Tappa(Budget.parse(14), window=4))]
    assert counts[2] == 4
    assert sum(counts) == 4 * 14


def test_after_a_cut_no_layer_gets_more_than_it_has(make_model, batch):
    model, inputs = make_model(), batch("t#t#tt")
    cut = Fastv(Budget.parse("12%")).program(model.facts)  # 76 entries, 13 from layer 2 on
    with torch.no_grad(), attach(model, cut + Tappa(Budget.parse(12)).program(model.facts)):
        _, stream = model.prefill(inputs)
    counts = stream.run.cached_tokens(4)
    assert sum(counts) == 4 * 12
    assert max(counts[2:]) <= 13
