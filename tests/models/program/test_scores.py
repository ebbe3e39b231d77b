"""Scores: the numbers of the published codes, definitions written out, and independence of padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.models.program.scores import (
    effective_rank,
    entropy_share,
    flow,
    holistic,
    key_strength,
    mean_of_groups,
    rated,
    relevance_kernel,
    rotary_decay,
    shares,
    smoothed,
    standardised,
    text_raters,
    text_relevance,
    unit_range,
    value_similarity,
    value_strength,
)
from vlm.models.program.select import top


def everything(n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.bool)


def test_flow_gives_the_score_of_flowcut(positive, signed, golden):
    strength = value_strength(signed(13, 1, 12, 8)[:, None])  # the numbers start from the mean over heads
    found = flow(positive(11, 1, 12), positive(12, 1, 12), strength, everything(12))
    torch.testing.assert_close(found[0], torch.tensor(golden["flowcut_score"]), rtol=1e-6, atol=0)


def test_value_similarity_and_strength_by_definition():
    class_value, value = torch.randn(1, 2, 4), torch.randn(1, 2, 5, 4)
    expected = torch.zeros(5)
    for h in range(2):
        own = [float(class_value[0, h] @ class_value[0, h])]
        products = own + [float(class_value[0, h] @ value[0, h, t]) for t in range(5)]
        expected += torch.tensor(products).softmax(0)[1:] / 2
    found = value_similarity(class_value, value, everything(5))
    torch.testing.assert_close(found[0], expected)
    assert found.sum() < 1  # the class token has its part
    torch.testing.assert_close(value_strength(value)[0], ((value[0, 0] + value[0, 1]) / 2).abs().sum(1))


def test_scores_run_on_over_layers():
    a, b, c = torch.rand(3, 1, 4)
    torch.testing.assert_close(smoothed(smoothed(smoothed(None, a), b), c), a / 4 + b / 4 + c / 2)


def test_entropy_share_has_its_bounds():
    assert entropy_share(torch.ones(1, 7), everything(7)).item() == pytest.approx(1)
    assert entropy_share(torch.eye(7)[:1], everything(7)).item() == 0  # 0 log 0 is 0, where the code has NaN
    assert entropy_share(torch.ones(1, 1), everything(1)).item() == 1
    half = torch.tensor([[1.0, 1, 0, 0]])
    assert entropy_share(half, everything(4)).item() == pytest.approx(0.5)


def test_effective_rank_counts_directions():
    directions = torch.linalg.qr(torch.randn(8, 8))[0]
    assert effective_rank(directions[None, :3].repeat(1, 4, 1), everything(12)).item() == pytest.approx(3, rel=1e-5)
    shifted = torch.randn(1, 12, 8) + 1000
    assert effective_rank(shifted, everything(12)).item() == pytest.approx(1, abs=0.1)
    assert effective_rank(shifted, everything(12), centre=True).item() > 4
    values = torch.tensor([4.0, 2.0, 1.0])
    expected = math.exp(-sum(v / 7 * math.log(v / 7) for v in values.tolist()))
    assert effective_rank(torch.diag(values)[None], everything(3)).item() == pytest.approx(expected)


def test_raters_by_definition():
    visual, text = torch.randn(1, 6, 4), torch.randn(1, 5, 4)
    relevance = (visual[0] @ text[0].T).softmax(1).mean(0)
    found = text_raters(visual, text, everything(6), everything(5))
    assert torch.equal(found[0], relevance > relevance.mean())


def test_rated_means_over_raters_and_heads():
    attention, raters = torch.rand(1, 4, 3, 6), torch.tensor([[True, False, True]])
    torch.testing.assert_close(rated(attention, raters)[0], attention[0][:, [0, 2]].mean((0, 1)))
    heads = attention[0][:, [0, 2]].sum((1, 2)).topk(2).indices
    torch.testing.assert_close(rated(attention, raters, heads=2)[0], attention[0][heads][:, [0, 2]].mean((0, 1)))


def test_rotary_decay_is_what_rotation_makes_of_ones():
    dim, distance = 8, torch.tensor([0, 1, 5])
    theta = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    for d in distance.tolist():
        q = torch.stack([theta.mul(0).cos(), theta.mul(0).sin()])
        k = torch.stack([(theta * d).cos(), (theta * d).sin()])  # unit pairs, the second one rotated
        expected = 2 * float((q * k).sum()) / dim**0.5
        assert rotary_decay(torch.tensor([d]), dim).item() == pytest.approx(max(expected, 1e-3), rel=1e-5)
    assert bool((rotary_decay(torch.arange(5000), 4) >= 1e-3).all())


def test_relevance_is_the_inverted_cosine_of_the_segment():
    image, text = torch.randn(2, 6, 4), torch.randn(2, 2, 4)
    valid = torch.ones(2, 6, dtype=torch.bool)
    found = text_relevance(image, text, valid, torch.ones(2, 2, dtype=torch.bool))
    for s in range(2):
        raw = -torch.nn.functional.cosine_similarity(image[s, :, None], text[s, None], dim=-1).mean(1)
        torch.testing.assert_close(found[s], (raw - raw.min() + 1e-6) / (raw.max() - raw.min()))
    assert bool((found > 0).all())  # or the least relevant token could never be picked
    kernel = relevance_kernel(image, found)
    torch.testing.assert_close(torch.diagonal(kernel, dim1=1, dim2=2), found.square())
    assert bool((torch.linalg.eigvalsh(kernel.double()) > -1e-6).all())


def test_holistic_by_definition():
    x, attention = torch.randn(1, 7, 4), torch.rand(1, 7)
    chunk = torch.tensor([[0, 0, 0, 0, 1, 1, 2]])
    expected = []
    for members in ([0, 1, 2, 3], [4, 5], [6]):
        size = len(members)
        unit = torch.nn.functional.normalize(x[0, members], dim=1)
        similarity = unit @ unit.T * (1 - torch.eye(size))
        mean = similarity.sum(1) / max(size - 1, 1)
        variance = (similarity - mean[:, None]).square().sum(1) / max(size - 1, 1)
        level = 1000 * attention[0, members]
        expected += (level + 0.09 * variance * level.mean() / (variance.mean() + 1e-6)).tolist()
    found = holistic(x, attention, everything(7), chunk)
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    # hence the mean of a chunk is 1090 times its mean attention: variance moves no quota
    assert found[0, :4].mean().item() == pytest.approx(1090 * attention[0, :4].mean().item(), rel=1e-4)


def test_small_scores_by_definition():
    key = torch.randn(1, 2, 5, 3)
    torch.testing.assert_close(key_strength(key)[0], key[0].transpose(0, 1).flatten(1).norm(p=1, dim=1))
    score = torch.randn(1, 9)
    torch.testing.assert_close(standardised(score, everything(9))[0], (score[0] - score.mean()) / (score.std() + 1e-8))
    assert unit_range(torch.ones(1, 4), everything(4)).tolist() == [[1, 1, 1, 1]]
    grouped = torch.arange(8.0)[None]
    assert mean_of_groups(grouped, everything(8), 4).tolist() == [[1.5, 5.5]]
    assert mean_of_groups(grouped, everything(8), 4, "max").tolist() == [[3, 7]]
    with pytest.raises(ValueError, match="score: expected groups of 4 tokens; found 6 tokens"):
        mean_of_groups(torch.zeros(1, 6), everything(6), 4)


SCORES = {
    "shares": lambda x, score, valid: shares(score, valid),
    "unit range": lambda x, score, valid: unit_range(score, valid, 1e-6),
    "standardised": lambda x, score, valid: standardised(score, valid),
    "entropy": lambda x, score, valid: entropy_share(score, valid)[:, None].expand_as(score),
    "rank": lambda x, score, valid: effective_rank(x, valid, centre=True)[:, None].expand_as(score),
    "flow": lambda x, score, valid: flow(score, score.square(), value_strength(x[:, None]), valid),
    "similarity": lambda x, score, valid: value_similarity(x.new_ones(len(x), 1, 4), x[:, None], valid),
    "relevance": lambda x, score, valid: text_relevance(x, x.new_ones(len(x), 1, 4), valid, valid[:, :1] | True),
    "holistic": lambda x, score, valid: holistic(x, score, valid, (valid.long().cumsum(1) - 1).clamp_min(0) // 3),
    "raters": lambda x, score, valid: text_raters(x, x, valid, valid).float(),
}


@pytest.mark.parametrize("name", SCORES)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_padding_and_other_segments_change_nothing(padded_case, name, seed, lengths):
    x, score, valid = padded_case(seed, lengths)
    together = SCORES[name](x, score, valid)
    for s, n in enumerate(lengths):
        alone = SCORES[name](x[s : s + 1, valid[s]], score[s : s + 1, valid[s]], everything(n))
        torch.testing.assert_close(together[s, valid[s]], alone[0], rtol=1e-5, atol=1e-5)


def test_scores_order_tokens_whatever_their_order():
    x, score = torch.randn(1, 9, 4), torch.rand(1, 9)
    order = torch.randperm(9)
    for name in ("shares", "unit range", "flow", "relevance"):
        straight, mixed = (
            SCORES[name](x, score, everything(9)),
            SCORES[name](x[:, order], score[:, order], everything(9)),
        )
        torch.testing.assert_close(mixed, straight[:, order])
    kept = top(score, everything(9), torch.tensor([4]))
    assert torch.equal(top(score[:, order], everything(9), torch.tensor([4])), kept[:, order])
