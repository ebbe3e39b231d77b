"""H2O against its procedure on dense attention: after the prompt, and at every generated token."""

import pytest
import torch

from vlm.models.kv.h2o import H2o
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget

ROWS = ("tt#ttt", "t#t#tt", "tttt")


@pytest.mark.parametrize("window", [None, 3])
def test_the_prompt(make_model, batch, dense, kept, best, window):
    model, inputs = make_model(), batch(*ROWS)
    method = H2o(Budget.parse(13), window, steps=False)
    for b, n in enumerate((41, 76)):
        recent = 6 if window is None else 3
        found = kept(model, inputs, method, b)
        for number, layer in enumerate(dense(model, inputs, b)):
            score = layer.paid(slice(0, n))  # all rows
            for h in range(2):
                assert found[number][h] == [*best(score[h], range(n - recent), 13 - recent), *range(n - recent, n)]


@pytest.mark.parametrize("keep", [7, "20%"])
def test_every_step_evicts_the_lightest(make_model, batch, spliced, by_hand, held, best, keep):
    model, inputs, steps = make_model(), batch(*ROWS), 6
    tokens = torch.randint(0, 40, (3, steps))
    states, logits = [], []
    with torch.no_grad(), attach(model, H2o(Budget.parse(keep)).program(model.facts)):
        _, stream = model.prefill(inputs)
        for step in range(steps):
            states.append([[held(stream.run, layer, b) for layer in range(4)] for b in range(3)])
            logits.append(model.step(stream, tokens[:, step]))
        states.append([[held(stream.run, layer, b) for layer in range(4)] for b in range(3)])
    for b in range(3):
        x, _, _ = spliced(model, inputs, b)
        n = len(x)
        capacity = 7 if keep == 7 else round(0.2 * n)
        recent = max(capacity // 2, 1)
        x = torch.cat([x, model.language.get_input_embeddings()(tokens[b])])
        sets: dict[tuple[int, int], list[int]] = {}  # (layer, head) -> what it holds
        score: dict[tuple[int, int], torch.Tensor] = {}

        def decode(number, _, place, attention, n=n, capacity=capacity, recent=recent, sets=sets, score=score, b=b):
            attention = attention.clone()
            for h in range(2):
                mine, total = slice(2 * h, 2 * h + 2), torch.zeros(len(place))
                total[:n] = attention[mine, :n, :n].sum(1).mean(0)
                have = list(range(n))
                if n > capacity:
                    have = [*best(total, range(n - recent), capacity - recent), *range(n - recent, n)]
                for row in range(n, len(place)):
                    assert states[row - n][b][number][h] == have
                    have.append(row)
                    hidden = torch.ones(len(place), dtype=torch.bool)
                    hidden[have] = False
                    attention[mine, row] = attention[mine, row].masked_fill(hidden, 0)
                    attention[mine, row] /= attention[mine, row].sum(1, keepdim=True)
                    total += attention[mine, row].mean(0)
                    if len(have) > capacity:
                        have.remove(min(have[:-recent], key=lambda t, s=total: (float(s[t]), t)))
                assert states[-1][b][number][h] == have
            return attention

        with torch.no_grad():
            expected = by_hand(model, x, edit=decode)
        for step in range(steps):
            torch.testing.assert_close(logits[step][b], expected[n + step], rtol=0, atol=1e-9)


def test_only_the_form_with_steps_stays_within_the_budget(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "tt")
    for steps, counts in ((True, [9, 7]), (False, [14, 7])):  # the second prompt has not grown to its budget yet
        with torch.no_grad(), attach(model, H2o(Budget.parse(9), steps=steps).program(model.facts)):
            _, stream = model.prefill(inputs)
            for token in range(5):
                model.step(stream, torch.tensor([token, token]))
        assert [int(stream.run.held[0].valid[b, 0].sum()) for b in range(2)] == counts
