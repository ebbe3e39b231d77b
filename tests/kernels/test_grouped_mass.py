"""Grouped-mass attention against SDPA and against the matrix procedure of VAR written out row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vlm.kernels.grouped_mass import grouped_mass_attention
from vlm.kernels.grouped_mass.rules import TEXT_SINK, VISUAL, VISUAL_SINK, visual_redistribution

shapes = st.tuples(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(1, 12),
)


def draw(shape, seed):
    batch, (heads, kv_heads), rows, extra, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, dim, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, rows + extra, dim, generator=g, dtype=torch.float64)
    gid = torch.randint(0, 4, (batch, rows + extra), generator=g)
    return q, k, v, gid


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 10_000))
def test_neutral_rule_is_sdpa_and_masses_sum_to_one(shape, seed):
    q, k, v, gid = draw(shape, seed)
    out, mass = grouped_mass_attention(q, k, v, gid)
    rows, keys = q.shape[2], k.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask, enable_gqa=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_var_is_the_matrix_procedure(shape, seed, taken, rho, image_min):
    q, k, v, gid = draw(shape, seed)
    rule = visual_redistribution(taken, rho, image_min)
    out, _ = grouped_mass_attention(q, k, v, gid, rule=rule)
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    expected = torch.zeros_like(out)
    for b in range(batch):
        sinks = (gid[b] == VISUAL_SINK) | (gid[b] == TEXT_SINK)
        plain, image = gid[b] == VISUAL, (gid[b] == VISUAL) | (gid[b] == VISUAL_SINK)
        for h in range(heads):
            for i in range(rows):
                seen = torch.arange(keys) <= i + keys - rows
                scores = (k[b, h] @ q[b, h, i]) / dim**0.5
                row = torch.where(seen, scores, -torch.inf).softmax(0)
                correctable = row[gid[b] == VISUAL_SINK].sum() > 0 and row[plain].sum() > 1e-6
                enough = row[image].sum() >= image_min and row[plain].sum() >= rho * row[image].sum()
                if enough and correctable:
                    moved = taken * row[sinks].sum()
                    row[sinks] *= 1 - taken
                    row[plain] += moved * row[plain] / row[plain].sum()
                assert row.sum().item() == pytest.approx(1)
                expected[b, h, i] = row @ v[b, h]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_rows_outside_the_selection_and_hidden_keys_are_left_alone():
    q, k, v, gid = draw((2, (4, 2), 6, 3, 8), 0)
    row_sel = torch.zeros(2, 6, dtype=torch.bool)
    out, _ = grouped_mass_attention(q, k, v, gid, rule=visual_redistribution(), row_sel=row_sel)
    torch.testing.assert_close(out, grouped_mass_attention(q, k, v, gid)[0])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4] = False  # left padding
    out, mass, lse = grouped_mass_attention(q[:1], k[:1], v[:1], gid[:1], key_valid=valid[:1], return_lse=True)
    cut = grouped_mass_attention(q[:1], k[:1, :, 4:], v[:1, :, 4:], gid[:1, 4:])
    torch.testing.assert_close(out[:, :, 1:], cut[0][:, :, 1:])
    assert (out[:, :, 0] == 0).all() and (mass[:, :, 0] == 0).all() and torch.isneginf(lse[:, :, 0]).all()


def test_gradients_of_every_rule_are_exact():
    q, k, v, gid = draw((1, (2, 1), 3, 2, 4), 3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for rule in ("neutral", visual_redistribution(image_min=0.0, rho=0.0)):
        assert torch.autograd.gradcheck(lambda q, k, v, r=rule: grouped_mass_attention(q, k, v, gid, rule=r), inputs)


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_ids": torch.zeros(1, 4)}, "group_ids must have shape"),
        ({"group_ids": torch.full((1, 5), 4)}, "group ids must be 0..3; found 4..4"),
        ({"rule": "vra"}, "rule must be"),
        ({"impl": "cuda"}, "impl must be one of auto, reference"),
        ({"k": torch.zeros(1, 3, 5, 8)}, "multiple of key heads"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"q": torch.zeros(1, 4, 5, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)}
    good["group_ids"] = torch.zeros(1, 5, dtype=torch.long)
    args = good | change
    if "group_ids" in change:
        args["group_ids"] = change["group_ids"].long()
    with pytest.raises(ValueError, match=message):
        grouped_mass_attention(args.pop("q"), args.pop("k"), args.pop("v"), args.pop("group_ids"), **args)
