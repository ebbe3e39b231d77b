"""Pairwise merging: ToMe's numbers and a loop over tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.models.program.merge import merge_pairs, merges_per_block
from vlm.models.program.segments import cosine


def test_pairs_are_those_of_tome(signed, golden):
    x, valid = signed(21, 1, 9, 4), torch.ones(1, 9, dtype=torch.bool)
    found = merge_pairs(x, x, torch.ones(1, 9), valid, torch.tensor([3]), class_token=True)
    place = found.place[0].tolist()
    order = sorted(range(len(place)), key=lambda i: (place[i] % 2, place[i]))  # there the first half comes first
    assert found.size is not None
    assert found.size[0, order].tolist() == golden["tome_cls"]["size"]
    torch.testing.assert_close(found.features[0, order], torch.tensor(golden["tome_cls"]["y"]), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 99), st.integers(1, 12), st.integers(0, 9), st.booleans())
def test_merge_by_hand(seed, n, merges, class_token):
    g = torch.Generator().manual_seed(seed)
    x, metric = torch.randn(1, n, 3, generator=g), torch.randn(1, n, 2, generator=g)
    size = torch.randint(1, 4, (1, n), generator=g).float()
    likeness = cosine(metric, metric)[0]
    best = {}
    for a in range(2 if class_token else 0, n, 2):
        if n > 1:
            best[a] = max(range(1, n, 2), key=lambda b, a=a: float(likeness[a, b]))
    gone = sorted(best, key=lambda a: -float(likeness[a, best[a]]))[: min(merges, (n - class_token) // 2)]
    groups = {t: [t] for t in range(n) if t not in gone}
    for a in gone:
        groups[best[a]].append(a)
    found = merge_pairs(x, metric, size, torch.ones(1, n, dtype=torch.bool), torch.tensor([merges]), class_token)
    assert found.place[0].tolist() == sorted(groups)
    assert found.size is not None
    for i, t in enumerate(sorted(groups)):
        weight = size[0, groups[t]]
        mean = (weight[:, None] * x[0, groups[t]]).sum(0) / weight.sum()
        torch.testing.assert_close(found.features[0, i], mean, rtol=1e-5, atol=1e-6)
        assert found.size[0, i] == weight.sum()


def test_merges_per_segment_and_padding(padded_case):
    x, _, valid = padded_case(2, [9, 4, 1])
    size = torch.ones(valid.shape)
    x = torch.where(valid[..., None], x, torch.nan)
    found = merge_pairs(x, x, size, valid, torch.tensor([3, 9, 2]))
    assert found.valid.sum(1).tolist() == [6, 2, 1]
    assert found.size is not None
    assert (found.size * found.valid).sum(1).tolist() == [9, 4, 1]
    for s, n in enumerate([9, 4, 1]):
        own = x[s : s + 1, valid[s]]
        alone = merge_pairs(own, own, size[:1, :n], torch.ones(1, n, dtype=torch.bool), torch.tensor([[3, 9, 2][s]]))
        torch.testing.assert_close(found.features[s, found.valid[s]], alone.features[0], rtol=1e-5, atol=1e-6)


def test_no_merge_changes_no_bit(padded_case):
    x, _, valid = padded_case(3, [6, 6])
    found = merge_pairs(x, x, 2 * torch.ones(valid.shape), valid, torch.tensor([0, 0]))
    assert torch.equal(found.features, x[valid].unflatten(0, (2, 6)))


@pytest.mark.parametrize(
    ("mean", "inflection", "merges"),
    [(16, 0, [16] * 24), (8, -1, [16, 10, 5, 0]), (8, 1, [0, 5, 10, 16])],
)
def test_merges_per_block(mean, inflection, merges):
    assert merges_per_block(len(merges), mean, inflection) == merges
    assert 577 - sum(merges_per_block(24, 16)) == 193  # ToMe on CLIP at 336 pixels, class token counted
