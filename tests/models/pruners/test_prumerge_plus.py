"""PruMerge+ in a model: which patches stay, and that the rest is merged as in PruMerge."""

import numpy
import pytest
import torch

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.reduce import add_weighted_neighbours
from vlm.models.pruners.prumerge_plus import Prumergeplus


def chosen(model, inputs, by_eye, method):
    """Places and features of each image under the method, and the dense attention and keys of the last block."""
    layouts = []
    with attach(model, method.program(model.facts)):
        features = by_eye.handed_over(model, lambda: layouts.append(model(inputs).layout))
    seen = by_eye.look(model, inputs.images)
    q, k = (t.transpose(1, 2).flatten(2) for t in (seen.blocks[3].q, seen.blocks[3].k))
    row = (q[:, :1] @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1)[:, 0, 1:]
    return [by_eye.places(layouts[0], n) for n in range(len(row))], features, seen.features, row, k[:, 1:]


def with_rest(kept, row):
    """The rest token stands at the heaviest patch that was dropped."""
    return sorted([*kept, max((i for i in range(len(row)) if i not in kept), key=lambda i: float(row[i]))])


def outliers(row):
    values = row.detach().numpy()
    low, high = numpy.percentile(values, [25, 75])
    return [i for i, value in enumerate(values) if value > high + 1.5 * (high - low)] or [int(values.argmax())]


def test_without_a_budget_outliers_and_a_stride(clear, batch, by_eye):
    places, *_, row, _ = chosen(clear(), batch("t#t#", "#t"), by_eye, Prumergeplus())
    for n in range(3):
        far = outliers(row[n])
        ratio = len(far) / 36
        step = max(1, int(int(1 / ratio) / 3))
        stride = list(range(0, 35, step))
        assert places[n] == with_rest(sorted({*far, *stride}), row[n])
    assert len({len(p) for p in places}) > 1


@pytest.mark.parametrize(("keep", "share"), [(9, 0.25), (12, 0.5), (2, 0.0)])
def test_a_budget_is_the_best_and_others_at_even_distances(clear, batch, by_eye, keep, share):
    method = Prumergeplus(Budget(tokens=keep), outstanding=share, neighbours=5)
    places, features, x, row, key = chosen(clear(), batch("t#t#", "#t"), by_eye, method)
    for n in range(3):
        first = by_eye.best(row[n], round((keep - 1) * share))
        left = [i for i in range(36) if i not in first]
        more = keep - 1 - len(first)
        spread = [left[int((i + 0.5) * len(left) / more)] for i in range(more)]
        kept = sorted(first + spread)
        assert places[n] == with_rest(kept, row[n]) and len(places[n]) == keep
        marks = torch.zeros(1, 36, dtype=torch.bool).index_fill(1, torch.tensor(kept), True)
        alone = slice(n, n + 1)
        everything = torch.ones(1, 36, dtype=torch.bool)
        expected = add_weighted_neighbours(x[alone], key[alone], row[alone], everything, marks, 5)
        torch.testing.assert_close(features[n], expected.features[0], rtol=0, atol=1e-9)


def test_bad_input(needs_class_token):
    needs_class_token(Prumergeplus, "prumerge_plus")
