"""Cuts at vit.out: features of each image, before the connector. No shipped method cuts there yet."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import LLM_IN, VIT_OUT, Select
from vlm.models.program.select import even_stride, max_min_diversity, max_min_order, uniform_random

QUARTER = Budget.parse("25%")


def test_equals_the_same_cut_after_the_connector_with_new_positions(make_model, batch):
    # one image per row, so that a segment is the same there and here; stride does not look at the features
    model, inputs = make_model(), batch("tt#ttt", "#t", "tttt")
    more = torch.tensor([3, 4, 5])
    found = []
    for site in (VIT_OUT, LLM_IN):
        with torch.no_grad(), attach(model, ((site, Select(QUARTER, even_stride(), "reindex")),)):
            out, (logits, stream) = model(inputs), model.prefill(inputs)
            found.append((out.hidden[out.layout.valid], logits, model.step(stream, more), out.layout))
    for one, other in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    for one, other in zip(found[0][3][:7], found[1][3][:7], strict=True):  # the fields that every model has
        assert torch.equal(one[found[0][3].valid], other[found[1][3].valid])


def test_each_image_is_cut_by_its_own_features(make_model, batch):
    model, inputs = make_model(), batch("#t#", "t#")
    with attach(model, ((VIT_OUT, Select(QUARTER, max_min_diversity())),)):
        layout = model(inputs).layout
    features = model.vision(inputs.images).tokens
    for image in range(3):
        seen = layout.image == image
        order = max_min_order(features[image : image + 1], torch.ones(1, 36, dtype=torch.bool), 9)
        assert (layout.row[seen] * 6 + layout.col[seen]).tolist() == sorted(order[0].tolist())


def test_random_choice_depends_on_the_pixels_alone(make_model, batch, alone):
    model, inputs = make_model(), batch("t#", "tt#t")
    twice = inputs._replace(images=inputs.images[:1].expand(2, -1, -1, -1))
    with attach(model, ((VIT_OUT, Select(QUARTER, uniform_random(0))),)):
        different, same, single = (model(i).layout for i in (inputs, twice, alone(inputs, 1)))
    places = [
        [layout.row[layout.image == i] * 6 + layout.col[layout.image == i] for i in (0, 1)]
        for layout in (different, same)
    ]
    assert not torch.equal(*places[0])
    assert torch.equal(*places[1])
    assert torch.equal(single.row[single.visual] * 6 + single.col[single.visual], places[0][1])


def test_a_folding_connector_is_refused(make_model, batch):
    model = make_model(shuffle=2)
    with (
        pytest.raises(ModelError, match=r"vit.out: the connector Mlp mixes tokens, \(6, 6\) to \(3, 3\); prune at"),
        attach(model, ((VIT_OUT, Select(QUARTER, even_stride())),)),
    ):
        pass
