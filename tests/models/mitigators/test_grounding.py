"""Maps of a phrase: stop words, sinks, and the rows that are read."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.grounding import filtered, grounding_maps, magnets
from vlm.models.pruners.fastv import Fastv

WORDS = [" A", " red", " ball", " on", " the", " table", "."]


def test_stop_words_and_punctuation_are_magnets():
    assert magnets(WORDS) == [True, False, False, True, True, False, True]


def by_loops(rows: list[list[float]], magnet: list[bool], chosen: list[bool], tau: float) -> list[float]:
    share = [[value / sum(row) for value in row] for row in rows]
    of = [row for row, m in zip(share, magnet, strict=True) if m] or share
    common = [sum(column) / len(of) for column in zip(*of, strict=True)]
    kept = [row for row, m, c in zip(share, magnet, chosen, strict=True) if c and not m]
    found = [sum(column) / len(kept) for column in zip(*kept, strict=True)]
    mean = sum(common) / len(common)
    base = common if any(magnet) else [0.0] * len(common)
    return [0.0 if c > tau * mean else max(f - b, 0.0) for f, c, b in zip(found, common, base, strict=True)]


@pytest.mark.parametrize("stop", [True, False])
def test_filtering_is_that_of_loops(stop):
    rows = torch.rand(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 3] += 20  # a sink
    magnet = torch.tensor(magnets(WORDS)) & stop
    chosen = torch.tensor([True, True, True, False, False, False, False])
    got = filtered(rows, magnet, chosen)
    expected = by_loops(rows.tolist(), magnet.tolist(), chosen.tolist(), 4.0)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert got[3] == 0 and got.any()
    with pytest.raises(ModelError, match=r"^grounding: expected a phrase with a word that says something"):
        filtered(rows, torch.ones(7).bool(), chosen)


@torch.no_grad()
def test_the_rows_are_those_of_the_words_themselves(make_model, batch, spliced, by_hand):
    model, inputs, answer = make_model(), batch("t#t#tt"), [3, 4, 5, 6, 7, 8, 9]
    with attach(model, Fastv(Budget.parse("25%")).program(model.facts)):  # rests meanwhile
        got = grounding_maps(model, inputs, answer, WORDS, (1, 2))
    x, image, _ = spliced(model, inputs)
    x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor(answer))])
    attention: dict[int, torch.Tensor] = {}
    by_hand(model, x, edit=lambda layer, x, place, a: attention.setdefault(layer, a))
    rows = torch.stack([attention[layer].mean(0)[-7:, : len(image)][:, image >= 0] for layer in (1, 2)]).mean(0)
    chosen = torch.tensor([False, True, True, False, False, False, False])
    expected = filtered(rows, torch.tensor(magnets(WORDS)), chosen)
    torch.testing.assert_close(torch.cat([grid.flatten() for grid in got]), expected, rtol=0, atol=1e-12)
    assert [tuple(grid.shape) for grid in got] == [(6, 6)] * 2
    with pytest.raises(ModelError, match=r"^grounding: expected one prompt; found 2"):
        grounding_maps(model, batch("t#", "t#"), answer, WORDS, (1,))
