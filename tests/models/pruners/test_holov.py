"""HoloV in a model against loops over dense attention."""

from itertools import pairwise

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.holov import Holov


def by_hand(x, attention, keep, chunks, weight=0.09):
    """Places that stay of one image: quotas by the chunks' mean scores, inside a chunk the best by attention."""
    n = len(x)
    bounds = [0]
    for chunk in range(chunks):
        bounds.append(bounds[-1] + n // chunks + (chunk < n % chunks))
    members = [list(range(a, b)) for a, b in pairwise(bounds)]
    means = []
    for own in members:
        if not own:
            means.append(0.0)
            continue
        unit = torch.nn.functional.normalize(x[own], dim=1)
        alike = unit @ unit.T * (1 - torch.eye(len(own)))
        others = max(len(own) - 1, 1)
        mean = alike.sum(1) / others
        variance = (alike - mean[:, None]).square().sum(1) / others
        level = 1000 * attention[own]
        means.append(float((level + weight * variance * (level.mean() / (variance.mean() + 1e-6))).mean()))
    quota = [0] * chunks
    while sum(quota) < keep:  # what a full chunk cannot take goes to the others
        open_chunks = [c for c in range(chunks) if quota[c] < len(members[c])]
        left, total = keep - sum(quota), sum(means[c] for c in open_chunks)
        wanted = {c: int(left * means[c] / total) for c in open_chunks}
        if all(wanted[c] <= len(members[c]) - quota[c] for c in open_chunks):
            for c in sorted(open_chunks, key=lambda c: -means[c])[: left - sum(wanted.values())]:
                wanted[c] += 1
        for c in open_chunks:
            quota[c] += min(wanted[c], len(members[c]) - quota[c])
    return sorted(i for c in range(chunks) for i in sorted(members[c], key=lambda i: -attention[i])[: quota[c]])


@pytest.mark.parametrize(("keep", "options"), [(18, {}), (25, {"chunks": 5}), (7, {"layer": 1, "chunks": 40})])
def test_equals_loops_over_dense_attention(clear, batch, by_eye, keep, options):
    model, inputs = clear(), batch("t#t#", "#t")
    with attach(model, Holov(Budget(tokens=keep), **options).program(model.facts)):
        layout = model(inputs).layout
    seen = by_eye.look(model, inputs.images)
    score = seen.class_row(options.get("layer", 3))
    expected = [by_hand(seen.features[n], score[n], keep, options.get("chunks", 16)) for n in range(3)]
    assert [by_eye.places(layout, n) for n in range(3)] == expected
    assert all(len(places) == keep for places in expected) and len({*map(tuple, expected)}) == 3


def test_every_part_of_the_picture_keeps_some(clear, batch, by_eye):
    # what sets it apart from the best of all: no part is left out while its attention has a share in the budget
    model, inputs = clear(), batch("#", "#")
    with attach(model, Holov(Budget(tokens=18), chunks=6).program(model.facts)):
        layout = model(inputs).layout
    attention = by_eye.look(model, inputs.images).class_row()
    for n in range(2):
        parts = attention[n].reshape(6, 6).sum(1)
        kept = torch.tensor(by_eye.places(layout, n)).div(6, rounding_mode="floor").bincount(minlength=6)
        assert bool((kept >= (18 * parts / parts.sum()).long().clamp_max(6)).all())


def test_bad_input(clear, needs_class_token):
    needs_class_token(Holov, "holov")
    with pytest.raises(ModelError) as error:
        Holov(Budget(tokens=9), chunks=0).program(clear().facts)
    assert str(error.value) == "holov: expected chunks of at least 1; found 0"
