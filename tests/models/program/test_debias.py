"""Attention without its bias for place and padding: the published constants and pictures."""

import math

import pytest
import torch
from PIL import Image

from vlm.data.images import ImageTransform
from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.debias import (
    Debias,
    PatchPlace,
    cubic_weight,
    exponential_weight,
    fit_position,
    picture_share,
    raster_share,
    without_padding,
)
from vlm.models.program.program import Tokens
from vlm.models.program.select import top_by
from vlm.models.program.signals import PatchAttention, Signal
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.pyramiddrop import Pyramiddrop
from vlm.models.pruners.sgl import Sgl
from vlm.models.pruners.sparsevlm import Sparsevlm


def test_weights_fall_from_the_first_token_to_the_last():
    valid = torch.ones(1, 576, dtype=torch.bool)
    assert raster_share(valid)[0, [0, 575]].tolist() == [0, 1]
    weight = exponential_weight(valid, 2.2938)
    assert weight[0, 0] == 1
    assert weight[0, 575].item() == pytest.approx(math.exp(-2.2938))
    assert weight[0, 100].item() == pytest.approx(math.exp(-2.2938 * 100 / 575))
    assert cubic_weight(valid)[0, 575].item() == pytest.approx(0.358239, abs=1e-6)
    assert cubic_weight(valid)[0, 0] == 1


def test_a_fit_finds_the_exponential_and_its_weight_makes_it_flat():
    x = torch.linspace(0, 1, 50)
    fit = fit_position(0.3 * torch.exp(1.7 * x))
    assert (fit.scale, fit.sigma) == pytest.approx((0.3, 1.7), rel=1e-5)
    flat = 0.3 * torch.exp(1.7 * x) * exponential_weight(torch.ones(1, 50, dtype=torch.bool), fit.sigma)
    torch.testing.assert_close(flat, torch.full((1, 50), 0.3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention", [[1.0], [1.0, 0.0]])
def test_a_fit_needs_positive_attention(attention):
    with pytest.raises(ValueError, match="mean_attention: expected two positive values or more; found"):
        fit_position(torch.tensor(attention))


def test_padding_does_not_move_the_weights():
    valid = torch.tensor([[False, True, True, False, True]])
    alone = exponential_weight(torch.ones(1, 3, dtype=torch.bool), torch.tensor([1.0]))
    padded = exponential_weight(valid, torch.tensor([1.0]))
    assert padded[0, [1, 2, 4]].tolist() == alone[0].tolist()
    assert padded[0, [0, 3]].tolist() == [0, 0]
    assert cubic_weight(valid)[0, [1, 2, 4]].tolist() == cubic_weight(valid[:, [1, 2, 4]])[0].tolist()
    assert raster_share(torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0]]


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(480, 640, 18, 24), (640, 480, 24, 18), (333, 500, 16, 24), (336, 336, 24, 24)],
)
def test_patches_that_show_the_picture(height, width, rows, columns):
    shown = without_padding(height, width, 24)
    assert shown.any(1).sum() == rows
    assert shown.any(0).sum() == columns
    assert shown.sum() == rows * columns
    assert torch.equal(shown, shown.flip(0, 1))


def test_a_lower_threshold_keeps_patches_that_are_mostly_padding():
    assert without_padding(300, 700, 24, 0.01).any(1).sum() > without_padding(300, 700, 24, 0.5).any(1).sum()


@pytest.mark.parametrize(("text", "sigma"), [("2.2938", 2.2938), (0, 0.0), ("fastv", None), (Debias(1.5), 1.5)])
def test_a_recipe_names_a_sigma_or_the_authors_weight(text, sigma):
    assert Debias.parse(text).sigma == sigma


@pytest.mark.parametrize(
    ("table", "sigma", "padding"),
    [({"sigma": "1.5"}, 1.5, None), ({"padding": "0.5"}, 0, 0.5), ({"sigma": "fastv", "padding": 0.01}, None, 0.01)],
)
def test_a_table_names_weight_and_padding(table, sigma, padding):
    assert Debias.parse(table) == Debias(sigma, padding)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"slope": 2}, "expected sigma, padding or both; found slope"),
        ({}, "found nothing"),
        ({"padding": 2}, "expected the share of a patch, above 0 and at most 1; found 2"),
        ({"sigma": -1}, "expected the sigma of exp"),
    ],
)
def test_another_table_is_refused(table, expected):
    with pytest.raises(ValueError, match=expected):
        Debias.parse(table)


@pytest.mark.parametrize("least", [0.5, 0.01])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 333), (300, 300), (99, 1000)])
def test_padding_is_read_from_the_pixels_that_the_transform_made(size, least):
    width, height = size
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    transform = ImageTransform((336, 336), mean, std, "pad", "nearest")
    noise = torch.randint(130, 255, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    share = picture_share(transform(Image.fromarray(noise.numpy()))[None], mean, std, (24, 24))
    assert torch.equal(share[0] >= least - 1e-6, without_padding(height, width, 24, least).flatten())


def test_padding_ranks_below_the_picture_and_stays_only_where_the_budget_is_larger(make_model, batch, alone):
    model, inputs = make_model(), batch("tt#ttt", "t#t#tttt")
    fill = torch.tensor(model.vision.image.mean).double()[:, None, None]
    fill = ((fill * 255).round() / 255 - fill) / torch.tensor(model.vision.image.std).double()[:, None, None]
    inputs.images[0, :, :16] = inputs.images[0, :, 32:] = fill  # rows 2 and 3 of 6 show the picture
    inputs.images[2, :, :, :20] = fill  # columns 0 and 1 do not, and half of column 2
    shown = torch.ones(3, 6, 6, dtype=torch.bool)
    shown[0, :2] = shown[0, 4:] = shown[2, :, :2] = False

    def kept(inputs, method):
        with torch.no_grad(), attach(model, method.program(model.facts)):
            layout = model(inputs).layout
        return [
            (layout.image[b] * 36 + layout.row[b] * 6 + layout.col[b])[layout.visual[b]].tolist()
            for b in range(len(inputs.tokens))
        ]

    padded = Debias(0.0, 0.5)
    for method in (Fastv, Pyramiddrop, Sgl, Sparsevlm):
        for place in kept(inputs, method(Budget.parse(6), debias=padded)):
            assert shown.flatten()[place].all()
    found = kept(inputs, Fastv(Budget.parse(6), debias=padded))
    assert found[0] == kept(alone(inputs, 0), Fastv(Budget.parse(6), debias=padded))[0]
    assert not shown.flatten()[kept(inputs, Fastv(Budget.parse(6)))[0]].all()
    [more, _] = kept(inputs, Fastv(Budget.parse(15), debias=padded))
    assert len(more) == 15
    assert set(torch.nonzero(shown[0].flatten())[:, 0].tolist()) <= set(more)


def test_where_padding_cannot_be_told_it_is_refused():
    with pytest.raises(ModelError, match="expected a composed model"):
        BaseVlm().picture_share(None)


@pytest.mark.parametrize("text", ["-1", "padding", "inf", "nan"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"expected the sigma of exp.* or fastv; found"):
        Debias.parse(text)


def test_an_encoder_s_attention_can_be_debiased_with_the_same_function():
    # of two equal patches the earlier one stays, and a late one must be larger by the weight
    signal = PatchAttention(3)
    value = torch.tensor([[1.0, 3.0, 1.0, 3.0 * math.exp(2 * 2 / 5) - 0.01, 1.0, 2.9]])

    def of(asked: Signal) -> torch.Tensor:
        return value if asked == signal else torch.linspace(0, 1, 6)[None]

    ones = torch.ones(1, 6, dtype=torch.bool)
    tokens = Tokens.of_images(torch.zeros(1, 6, 2), ones, torch.zeros(1, dtype=torch.long), of)
    selector = top_by(signal, Debias(2.0))
    assert selector.needs == (signal, PatchPlace())
    assert torch.nonzero(selector.choose(tokens, torch.tensor([1]))[0]).flatten().tolist() == [1]
    value[0, 3] += 0.02
    assert torch.nonzero(selector.choose(tokens, torch.tensor([1]))[0]).flatten().tolist() == [3]
