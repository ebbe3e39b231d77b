"""Budgets in their four meanings, and the averages that papers report."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.models.program.schedule import (
    DecoderShape,
    flow_removals,
    removed_shares,
    report,
    solve,
    tokens_per_layer,
)
from vlm.models.program.scores import entropy_share

VICUNA = DecoderShape(layers=32, width=4096, mlp=11008, kv_heads=32, head_dim=128)


@pytest.mark.parametrize(("layer", "kept"), [(2, [166, 98, 30]), (3, [152, 82, 11])])
def test_fastv_for_an_average(layer, kept):
    assert [solve(average, "average", 576, [layer], VICUNA)[0] for average in (192, 128, 64)] == kept


@pytest.mark.parametrize(
    ("counts", "nominal", "true"),  # SparseVLM with and without recycled tokens: what it says, what layers work on
    [
        ((309, 204, 113), 192.03, 206.5),
        ((312, 117, 39), 128.6, 145.4),
        ((82, 32, 18), 64.8, 82.3),
        ((300, 200, 118), 192.4, 206.8),
        ((238, 108, 60), 128.0, 144.1),
        ((66, 34, 20), 64.4, 81.8),
    ],
)
def test_averages_of_sparsevlm(counts, nominal, true):
    assert sum(tokens_per_layer(576, [2, 6, 15], counts, 32)) / 32 == pytest.approx(nominal, abs=0.05)
    assert sum(tokens_per_layer(576, [3, 7, 16], counts, 32)) / 32 == pytest.approx(true, abs=0.051)


def test_pyramiddrop_for_an_average():
    default = tokens_per_layer(576, [8, 16, 24], [288, 144, 72], 32)
    assert sum(default) / 32 == 270
    counts = solve(192, "average", 576, [8, 16, 24], VICUNA)
    assert counts[0] / 576 == pytest.approx(0.253, abs=1e-3)
    assert sum(tokens_per_layer(576, [8, 16, 24], counts, 32)) / 32 == 192
    assert solve(128, "average", 576, [2, 10, 20], VICUNA, shares=[0.32, 0.16, 0.08]) == (184, 92, 46)


def test_an_impossible_average_is_refused_with_what_is_possible():
    text = r"budget: expected a target of average from 144\.75 to 576 with cuts at layers 8, 16, 24 of 32; found 128"
    with pytest.raises(ValueError, match=text):
        solve(128, "average", 576, [8, 16, 24], VICUNA)
    with pytest.raises(ValueError, match="found 600"):
        solve(600, "final", 576, [2], VICUNA)


@pytest.mark.parametrize("cuts", [[], [3, 3], [5, 2], [-1], [32]])
def test_cuts_ascend_within_the_decoder(cuts):
    with pytest.raises(ValueError, match=r"cuts: expected ascending layers from 0 to 31; found"):
        solve(10, "final", 576, cuts, VICUNA)


def test_counts_must_not_grow():
    with pytest.raises(ValueError, match=r"after: expected 2 counts that do not grow from 9; found \(5, 6\)"):
        tokens_per_layer(9, [1, 2], [5, 6], 4)
    with pytest.raises(ValueError, match=r"shares: expected 2 numbers that do not grow; found \(0.1, 0.2\)"):
        solve(10, "final", 576, [2, 4], VICUNA, shares=[0.1, 0.2])


def test_a_report_counts_what_the_literature_counts():
    full = report(tokens_per_layer(576, [2], [576], 32), 0, VICUNA)
    assert full.kv_bytes == 288 * 2**20  # half a MiB per token
    n, d, m = 576 + 40, 4096, 11008
    cut = report(tokens_per_layer(576, [2], [64], 32), 40, VICUNA)
    after = 64 + 40
    one, other = 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m, 4 * after * d**2 + 2 * after**2 * d + 3 * after * d * m
    assert cut.flops == 2 * one + 30 * other
    assert (cut.after_layer, cut.final, cut.average) == (64, 64, (2 * 576 + 30 * 64) / 32)
    two = report(tokens_per_layer(576, [2, 10], [100, 50], 32), 0, VICUNA)
    assert (two.after_layer, two.final) == (100, 50)


@settings(deadline=None, max_examples=30)
@given(
    meaning=st.sampled_from(["final", "after_layer", "average", "flops", "kv_bytes"]),
    cuts=st.sets(st.integers(0, 31), min_size=1, max_size=4),
    visual=st.integers(50, 600),
    share=st.floats(0, 1),
    text=st.integers(0, 50),
    even=st.booleans(),
)
def test_a_solution_is_the_nearest_there_is(meaning, cuts, visual, share, text, even):
    cuts = sorted(cuts)
    shares = [1.0] * len(cuts) if even else None

    def value(counts: list[int]) -> float:
        return getattr(report(tokens_per_layer(visual, cuts, counts, 32), text, VICUNA), meaning)

    least, most = value([1] * len(cuts)), value([visual] * len(cuts))
    target = least + share * (most - least)
    counts = solve(target, meaning, visual, cuts, VICUNA, shares=shares, text=text)
    assert list(counts) == sorted(counts, reverse=True)
    assert 1 <= counts[-1] <= counts[0] <= visual
    below, above = ([min(max(n + by, 1), visual) for n in counts] for by in (-1, 1))
    slack = 1e-9 * most
    if meaning == "after_layer":
        assert abs(counts[0] - target) <= 0.5 + slack
    elif meaning == "final":
        assert abs(counts[-1] - target) <= 0.5 + slack
    else:
        assert value(below) - slack <= target <= value(above) + slack


def test_flowcut_removes_as_its_code_and_its_paper_say(signed, golden):
    attention = (4 * signed(14, 1, 576)).softmax(-1)
    concentration = float(entropy_share(attention, torch.ones(1, 576, dtype=torch.bool)))
    for left, removed in golden["flowcut_r"].items():
        assert [flow_removals(concentration, 576, target, int(left)) for target in (64, 128, 192)] == removed
    trace, tokens = [], 576
    for layer in range(1, 22, 2):
        tokens -= flow_removals(0.8, tokens, 64, 22 - layer - 1)
        trace.append(tokens)
    assert trace == [535, 495, 456, 418, 381, 345, 309, 273, 235, 191, 64]
    assert flow_removals(1.0, 576, 64, 20) == 0  # even attention: nothing, until the last cut
    assert flow_removals(0.0, 70, 64, 1) == 6
    assert flow_removals(0.5, 60, 64, 4) == 0


def test_epic_starts_mild_and_keeps_the_teacher_milder():
    assert removed_shares(0.0, 0.7) == pytest.approx((0.1, 0.0))
    assert removed_shares(1.0, 0.0) == pytest.approx((0.26, 0.0))
    assert removed_shares(0.1, 1.0) == pytest.approx((0.164, 0.014))  # the gap has grown to 0.15
    student, teacher = removed_shares(2.0, 0.999)
    assert student == pytest.approx(0.26 + 0.999 * 0.48)
    assert teacher == pytest.approx(student - 0.3)
