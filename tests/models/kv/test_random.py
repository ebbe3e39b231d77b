"""The random baseline: even chances, a choice of its own for each head, layer and seed."""

from itertools import combinations

import torch

from vlm.models.kv.random import Random
from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, held_whole
from vlm.models.program.layout import Layout


def entries(length: int, heads: int, seed: int, layer: int = 0) -> Entries:
    place = torch.arange(length)[None]
    layout = Layout(torch.ones_like(place), place, place, place, place, place, place)
    held = held_whole(layout, heads)
    return Entries(layer, layout, held, lambda signal: place, 0, lambda: torch.tensor([seed]), {}, {})


def test_every_entry_before_the_window_has_the_same_chance():
    times = torch.zeros(12)
    for seed in range(50):
        marks = Random(Budget.parse(6), window=3)._keep(entries(12, 16, seed))
        assert marks.sum(2).unique().tolist() == [6]
        times += marks[0].sum(0)
    assert times[9:].tolist() == [800] * 3
    # 3 of 9 in 800 draws: a third of them, with a deviation of 13
    assert (times[:9] - 800 / 3).abs().max() < 4 * 13.4


def test_heads_layers_seeds_and_pictures_differ():
    def choice(seed: int = 0, picture: int = 5, layer: int = 0) -> torch.Tensor:
        return Random(Budget.parse(20), seed=seed)._keep(entries(200, 2, picture, layer))[0]

    chosen = [*choice(), *choice(seed=1), *choice(picture=6), *choice(layer=1)]
    assert all(not torch.equal(a, b) for a, b in combinations(chosen, 2))
    assert torch.equal(choice(), choice())


def test_without_a_window_the_last_entry_may_go():
    marks = Random(Budget.parse(3), window=0)._keep(entries(60, 40, 1))
    assert marks.sum(2).unique().tolist() == [3]
    assert not marks[0, :, -1].all()
