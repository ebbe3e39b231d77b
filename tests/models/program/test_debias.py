"""Attention without its bias for place and padding: the published constants and pictures."""

import math

import pytest
import torch

from vlm.models.program.debias import (
    Debias,
    cubic_weight,
    exponential_weight,
    fit_position,
    raster_share,
    without_padding,
)
from vlm.models.program.program import Tokens
from vlm.models.program.select import top_by
from vlm.models.program.signals import PatchAttention, Signal


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


@pytest.mark.parametrize("text", ["-1", "padding", "inf", "nan", {"sigma": 2}])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"expected the sigma of exp.* or fastv; found"):
        Debias.parse(text)


def test_an_encoder_s_attention_can_be_debiased_with_the_same_function():
    # of two equal patches the earlier one stays, and a late one must be larger by the weight
    signal = PatchAttention(3)
    value = torch.tensor([[1.0, 3.0, 1.0, 3.0 * math.exp(2 * 2 / 5) - 0.01, 1.0, 2.9]])
    read: Signal | None = None

    def of(asked: Signal) -> torch.Tensor:
        nonlocal read
        read = asked
        return value

    ones = torch.ones(1, 6, dtype=torch.bool)
    tokens = Tokens.of_images(torch.zeros(1, 6, 2), ones, torch.zeros(1, dtype=torch.long), of)
    selector = top_by(signal, Debias(2.0))
    assert selector.needs == (signal,)
    assert torch.nonzero(selector.choose(tokens, torch.tensor([1]))[0]).flatten().tolist() == [1]
    assert read == signal
    value[0, 3] += 0.02
    assert torch.nonzero(selector.choose(tokens, torch.tensor([1]))[0]).flatten().tolist() == [3]
