"""Grouped-mass attention against SDPA, and each published method against what it does to a matrix of attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vlm.kernels import row_chunks
from vlm.kernels.dispatch import Call
from vlm.kernels.grouped_mass import explain, grouped_mass_attention
from vlm.kernels.grouped_mass.rules import (
    TEXT_SINK,
    VISUAL,
    VISUAL_SINK,
    MassFloor,
    Neutral,
    Redistribution,
    Static,
    sink_calibration,
    visual_redistribution,
)

DOUBLE = torch.float64
KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")
IMPLS = ("flex", "torch", "reference")
seeds = st.integers(0, 10_000)
sizes = st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 9))
some_kinds = st.lists(st.sampled_from(KINDS), unique=True, max_size=3).map(tuple)


def draw(seed, size, heads=4, kv_heads=2, dim=5, groups=4):
    batch, rows, keys = size
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, dim, generator=g, dtype=DOUBLE)
    k, v = torch.randn(2, batch, kv_heads, keys, dim, generator=g, dtype=DOUBLE)
    return q, k, v, torch.randint(0, groups, (batch, keys), generator=g)


def causal_mask(rows, keys):
    return torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)


def scores_of(q, k):
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[3] ** 0.5


def matrix(scores, mask):
    """[B,H,Q,K] attention weights, 0 in rows that see nothing."""
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)


def times_values(weights, v):
    return weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


def rows_of(weights, group_ids):
    """((batch, head, row), the row to edit in place, the groups of its keys) of each row."""
    for b in range(weights.shape[0]):
        for h in range(weights.shape[1]):
            for i in range(weights.shape[2]):
                yield (b, h, i), weights[b, h, i], group_ids[b, h] if group_ids.ndim == 3 else group_ids[b]


def close(got, expected, atol=1e-12, msg=None):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=msg)


# What it is


@settings(deadline=None, max_examples=15)
@given(sizes, st.sampled_from([(1, 1), (4, 2), (7, 1)]), some_kinds, st.booleans(), seeds)
def test_neutral_is_sdpa_and_masses_are_sums_of_the_matrix(draw_common, sees, size, heads, kinds, by_head, seed):
    common = draw_common(seed, *size, kinds)
    mask = sees(common, *size)[:, None]
    q, k, v, groups = draw(seed, size, *heads)
    if by_head:
        groups = torch.stack([groups.roll(h, 1) for h in range(heads[0])], 1)
    weights = matrix(scores_of(q, k), mask)
    per_head = groups if by_head else groups[:, None].expand(-1, heads[0], -1)
    expected = torch.stack([(weights * (per_head == g)[:, :, None]).sum(-1) for g in range(4)], -1)
    zeros = torch.zeros(heads[0], 4, dtype=DOUBLE)
    for impl in IMPLS:
        out, mass, lse = grouped_mass_attention(q, k, v, groups, impl=impl, return_lse=True, **common)
        close(out, sdpa(q, k, v, attn_mask=mask, enable_gqa=True), msg=impl)
        close(mass, expected, msg=impl)
        close(mass.sum(-1), mask.any(-1).double().expand(mass.shape[:3]), msg=impl)
        close(lse, scores_of(q, k).masked_fill(~mask, -torch.inf).logsumexp(-1), msg=impl)
        same = grouped_mass_attention(q, k, v, groups, impl=impl, gamma=zeros, beta=zeros, **common)
        close(same[0], out, msg=impl)


RULES = {
    "neutral": lambda heads: Neutral(4),
    "static": lambda heads: Static(torch.linspace(-0.5, 2, 4, dtype=DOUBLE)),
    "static by head": lambda heads: Static(torch.linspace(0, 2, 4 * heads, dtype=DOUBLE).view(heads, 4)),
    "renormalised": lambda heads: Static.of([0.0, 3.0, 1.0, 0.5], renormalise=True),
    "VAR": lambda heads: visual_redistribution(image_min=0.1, rho=0.3),
    "ACT": lambda heads: sink_calibration(sink=2, groups=4),
    "floor": lambda heads: MassFloor(0.6),
}


@settings(deadline=None, max_examples=20)
@given(sizes, some_kinds, st.sampled_from(sorted(RULES)), st.booleans(), st.booleans(), seeds)
def test_every_implementation_is_the_reference(draw_common, size, kinds, rule, by_head, maps, seed):
    common = draw_common(seed, *size, kinds)
    q, k, v, groups = draw(seed, size)
    batch, rows, keys = size
    g = torch.Generator().manual_seed(seed)
    if by_head:
        groups = torch.randint(0, 4, (batch, 4, keys), generator=g)
    common["row_sel"] = torch.rand(batch, rows, generator=g) < 0.7
    if maps:
        common["gamma"], common["beta"] = torch.randn(2, 4, 4, generator=g, dtype=DOUBLE)
        common["key_bias"] = torch.randn(batch, 4 if by_head else 1, keys, generator=g, dtype=DOUBLE)
    common |= {"rule": RULES[rule](4), "return_lse": True, "kv_head_of": torch.tensor([0, 1, 1, 0])}
    expected = grouped_mass_attention(q, k, v, groups, impl="reference", **common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_chunks, "ROWS", 2)
        for impl in ("flex", "torch"):
            for x, y in zip(grouped_mass_attention(q, k, v, groups, impl=impl, **common), expected, strict=True):
                close(x, y, msg=impl)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
    st.sampled_from([(1, 1), (4, 2), (6, 1), (20, 1)]),
    st.sampled_from([(), ("hidden",), ("k_len",), ("documents",)]),
    st.sampled_from([Neutral(), visual_redistribution(0.7, 0.1, 0.05), Static.of([0.0, 3.0, 1.0, 0.5], True)]),
    st.booleans(),
    seeds,
)
def test_a_single_row_is_the_reference(draw_common, size, heads, kinds, rule, by_head, seed):
    (batch, keys), common = size, draw_common(seed, size[0], 1, size[1], kinds)
    q, k, v, groups = draw(seed, (batch, 1, keys), *heads)
    if by_head:
        groups = torch.randint(0, 4, (batch, heads[0], keys), generator=torch.Generator().manual_seed(seed))
    chosen = torch.arange(batch)[:, None] % 2 == seed % 2
    for selection in (None, chosen):
        expected = grouped_mass_attention(q, k, v, groups, rule=rule, row_sel=selection, impl="reference", **common)
        with torch.no_grad():  # as when a text grows, where few operations do it
            got = grouped_mass_attention(q, k, v, groups.int(), rule=rule, row_sel=selection, impl="torch", **common)
        for one, other in zip(got, expected, strict=True):
            close(one, other)


def test_order_of_keys_and_names_of_groups_do_not_matter():
    q, k, v, groups = draw(0, (2, 4, 9))
    rule = Static.of([0.5, 2.0, 1.0, 0.0])
    out, mass = grouped_mass_attention(q, k, v, groups, rule=rule, causal=False)
    order = torch.randperm(9)
    shuffled = grouped_mass_attention(q, k[:, :, order], v[:, :, order], groups[:, order], rule=rule, causal=False)
    close(shuffled[0], out)
    close(shuffled[1], mass)
    name = torch.tensor([2, 0, 3, 1])  # group g is now called name[g]
    renamed = Static(rule.gains[name.argsort()])
    again = grouped_mass_attention(q, k, v, name[groups], rule=renamed, causal=False)
    close(again[0], out)
    close(again[1][..., name], mass)


def test_groups_of_one_coefficient_are_one_group():
    q, k, v, groups = draw(1, (2, 4, 9))
    apart = grouped_mass_attention(q, k, v, groups, rule=Static.of([0.5, 2.0, 2.0, 1.0]))
    as_one = grouped_mass_attention(q, k, v, groups.where(groups != 2, 1), rule=Static.of([0.5, 2.0, 9.0, 1.0]))
    close(as_one[0], apart[0])
    close(as_one[1][..., 1], apart[1][..., 1] + apart[1][..., 2])


def test_rows_outside_the_selection_and_hidden_keys_are_left_alone():
    q, k, v, groups = draw(0, (2, 6, 9))
    row_sel = torch.zeros(2, 6, dtype=torch.bool)
    out, _ = grouped_mass_attention(q, k, v, groups, rule=MassFloor(0.9), row_sel=row_sel)
    close(out, grouped_mass_attention(q, k, v, groups)[0])
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[0, :4] = False  # left padding
    out, mass, lse = grouped_mass_attention(q[:1], k[:1], v[:1], groups[:1], key_valid=valid, return_lse=True)
    cut = grouped_mass_attention(q[:1], k[:1, :, 4:], v[:1, :, 4:], groups[:1, 4:])
    close(out[:, :, 1:], cut[0][:, :, 1:])
    assert (out[:, :, 0] == 0).all()
    assert (mass[:, :, 0] == 0).all()
    assert torch.isneginf(lse[:, :, 0]).all()


# Published methods, as matrix procedures


@settings(deadline=None, max_examples=30)
@given(sizes, seeds, st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_var_is_the_matrix_procedure(size, seed, taken, rho, image_min):
    q, k, v, groups = draw(seed, size)
    rule = visual_redistribution(taken, rho, image_min)
    out, _ = grouped_mass_attention(q, k, v, groups, rule=rule)
    weights = matrix(scores_of(q, k), causal_mask(*size[1:]))
    for _, row, of_key in rows_of(weights, groups):
        sinks, plain = (of_key == VISUAL_SINK) | (of_key == TEXT_SINK), of_key == VISUAL
        image = plain | (of_key == VISUAL_SINK)
        correctable = row[of_key == VISUAL_SINK].sum() > 0 and row[plain].sum() > 1e-6
        enough = row[image].sum() >= image_min and row[plain].sum() >= rho * row[image].sum()
        if enough and correctable:
            before, moved = row.sum().item(), taken * row[sinks].sum()
            row[sinks] *= 1 - taken
            row[plain] += moved * row[plain] / row[plain].sum()
            assert row.sum().item() == pytest.approx(before)
    close(out, times_values(weights, v), atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(sizes, seeds, st.floats(0, 1))
def test_act_is_the_matrix_procedure_with_sinks_of_each_head(size, seed, beta):
    q, k, v, _ = draw(seed, size)
    weights = matrix(scores_of(q, k), causal_mask(*size[1:]))
    received = weights.sum(2) / torch.arange(size[2], 0, -1)  # [B,H,K]: over the rows that can see a key
    sink = received > 0.1
    sink &= sink.cumsum(-1) > 1  # the first one stays
    out, _ = grouped_mass_attention(q, k, v, sink.long(), rule=sink_calibration(beta))
    for _, row, is_sink in rows_of(weights, sink):
        freed = (1 - beta) * row[is_sink].sum()
        if row[~is_sink].sum() > 1e-6:
            row[is_sink] *= beta
            row[~is_sink] += freed * row[~is_sink] / row[~is_sink].sum()
    close(out, times_values(weights, v), atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(sizes, seeds, st.floats(0, 1), st.sampled_from([1.5, 1e4]))
def test_mass_floor_is_the_matrix_procedure(size, seed, least, most):
    q, k, v, groups = draw(seed, size)
    out, _ = grouped_mass_attention(q, k, v, groups, rule=MassFloor(least, most=most))
    weights = matrix(scores_of(q, k), causal_mask(*size[1:]))
    for _, row, of_key in rows_of(weights, groups):
        image, before = of_key == VISUAL, row.sum().item()
        have = row[image].sum()
        if 1e-6 < have < least:
            lifted = min(least, most * float(have))
            row[image] *= lifted / have
            row[~image] *= (1 - lifted) / row[~image].sum()
            assert row.sum().item() == pytest.approx(before)
    close(out, times_values(weights, v), atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(sizes, seeds, st.floats(-0.9, 2))
def test_pai_raises_the_scores_of_the_image_in_the_last_row(size, seed, alpha):
    q, k, v, groups = draw(seed, size, groups=2)
    gamma = torch.tensor([[0.0, alpha]], dtype=DOUBLE).expand(4, 2)
    last = torch.arange(size[1]) == size[1] - 1
    out, _ = grouped_mass_attention(q, k, v, groups, rule=Neutral(2), gamma=gamma, row_sel=last.expand(size[0], -1))
    scores = scores_of(q, k)
    for b, image in enumerate(groups == 1):
        scores[b, :, -1, image] += alpha * scores[b, :, -1, image].abs()
    close(out, times_values(matrix(scores, causal_mask(*size[1:])), v))


@settings(deadline=None, max_examples=20)
@given(sizes, seeds, st.floats(0, 1))
def test_hgai_adds_what_the_heads_agree_on(size, seed, alpha):
    q, k, v, groups = draw(seed, size)
    scores = scores_of(q, k)
    bias = alpha * scores[:, :, -1].abs().mean(1) * (groups == VISUAL)  # [B,K]
    last = torch.arange(size[1]) == size[1] - 1
    out, _ = grouped_mass_attention(q, k, v, groups, key_bias=bias[:, None], row_sel=last.expand(size[0], -1))
    scores[:, :, -1] += bias[:, None]
    close(out, times_values(matrix(scores, causal_mask(*size[1:])), v))


@settings(deadline=None, max_examples=20)
@given(sizes, seeds)
def test_static_gains_multiply_the_matrix_and_renormalised_ones_add_their_log(size, seed):
    q, k, v, groups = draw(seed, size)
    gains = torch.rand(4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + 0.1  # [heads, groups]
    of_key = torch.stack([gains[:, each] for each in groups])  # [B,H,K]
    mask = causal_mask(*size[1:])
    out, mass = grouped_mass_attention(q, k, v, groups, rule=Static(gains))
    close(out, times_values(matrix(scores_of(q, k), mask) * of_key[:, :, None], v))
    weights = matrix(scores_of(q, k) + of_key.log()[:, :, None], mask)
    out, same_mass = grouped_mass_attention(q, k, v, groups, rule=Static(gains, renormalise=True))
    close(out, times_values(weights, v))
    close(same_mass, mass)
    close(grouped_mass_attention(q, k, v, groups, beta=gains.log())[0], out)


# Rules on their own


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0, 1), st.sampled_from(["renormalised", "VAR", "ACT", "floor"]))
def test_rules_that_move_mass_keep_the_sum(seed, least, name):
    mass = (3 * torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)).softmax(-1)
    rule = MassFloor(least) if name == "floor" else RULES[name](4)
    coefficient = rule(mass, torch.ones(2, 5, dtype=torch.bool))
    close((coefficient * mass).sum(-1), torch.ones(2, 4, 5, dtype=DOUBLE))
    assert (coefficient >= 0).all()


def test_nothing_taken_or_no_visual_sink_is_neutral():
    mass = torch.rand(2, 3, 5, 4).softmax(-1)
    rows = torch.ones(2, 5, dtype=torch.bool)
    assert (visual_redistribution(taken=0.0)(mass, rows) == 1).all()
    assert (sink_calibration(beta=1.0, groups=4)(mass, rows) == 1).all()
    mass[..., VISUAL_SINK] = 0
    assert (visual_redistribution(rho=0.0, image_min=0.0)(mass, rows) == 1).all()


def test_a_floor_that_is_kept_already_or_cannot_be_is_neutral():
    mass = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[None, None]
    assert (MassFloor(0.5, groups=2)(mass, torch.ones(1, 4, dtype=torch.bool)) == 1).all()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_row_that_sees_nothing_stays_empty(rule):
    q, k, v, groups = (x.float() if x.is_floating_point() else x for x in draw(0, (1, 3, 4)))
    k.requires_grad_()
    rule = Static.of([9.0] * 4, renormalise=True) if rule == "renormalised" else RULES[rule](4)
    out, mass, _ = grouped_mass_attention(q, k, v, groups, rule=rule, return_lse=True, k_len=torch.tensor([2]))
    assert (out[:, :, 0] == 0).all()
    assert (mass[:, :, 0] == 0).all()
    assert out.isfinite().all()
    (out.sum() + mass.square().sum()).backward()
    assert k.grad is not None
    assert k.grad.isfinite().all()


# Gradients


@pytest.mark.parametrize("rule", sorted(RULES))
def test_gradients_of_every_rule_are_exact(monkeypatch, rule):
    monkeypatch.setattr(row_chunks, "ROWS", 2)
    q, k, v, groups = draw(3, (1, 3, 5), 2, 1, 3)
    gamma, beta = (0.3 * torch.randn(2, 2, 4, dtype=DOUBLE)).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v, gamma, beta, torch.randn(1, 1, 5, dtype=DOUBLE))]
    row_sel = torch.tensor([[False, True, True]])

    def run(q, k, v, gamma, beta, key_bias, impl="reference"):
        maps = {"gamma": gamma, "beta": beta, "key_bias": key_bias}
        return grouped_mass_attention(
            q, k, v, groups, rule=RULES[rule](2), row_sel=row_sel, impl=impl, return_lse=True, **maps
        )

    assert torch.autograd.gradcheck(run, inputs)
    upstream = [torch.randn_like(x) for x in run(*inputs)]
    gradients = [torch.autograd.grad(run(*inputs, impl=impl), inputs, upstream) for impl in ("torch", "reference")]
    for x, y in zip(*gradients, strict=True):
        close(x, y)


def test_gains_have_gradients():
    q, k, v, groups = draw(4, (1, 3, 5))
    gains = torch.rand(4, dtype=DOUBLE, requires_grad=True)
    for again in (True, False):
        assert torch.autograd.gradcheck(
            lambda g, a=again: grouped_mass_attention(q, k, v, groups, rule=Static(g, renormalise=a))[0], [gains]
        )


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_stopped_rules_are_constants_in_the_backward(impl):
    q, k, v, groups = draw(5, (2, 4, 9))
    rule, upstream = MassFloor(0.7), torch.randn(2, 4, 4, 5, dtype=DOUBLE)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weights = matrix(scores_of(q, k), causal_mask(4, 9))
    member = torch.nn.functional.one_hot(groups, 4).double()[:, None]  # [B,1,K,G]
    constant = rule((weights @ member).detach(), torch.ones(2, 4, dtype=torch.bool))
    expected = torch.autograd.grad(times_values(weights * (constant @ member.mT), v), inputs, upstream)
    got = grouped_mass_attention(q, k, v, groups, rule=rule, rule_grad="stop", impl=impl)[0]
    for x, y in zip(torch.autograd.grad(got, inputs, upstream), expected, strict=True):
        close(x, y)
    full = torch.autograd.grad(grouped_mass_attention(q, k, v, groups, rule=rule)[0], inputs, upstream)
    assert not torch.allclose(full[0], expected[0])


def test_any_function_of_the_masses_is_a_rule():
    class Halve:
        groups = 2

        def __call__(self, mass, rows):
            return torch.where(mass > 0.5, 0.5, 1.0).to(mass)

    q, k, v, groups = draw(6, (1, 4, 6), groups=2)
    weights = matrix(scores_of(q, k), causal_mask(4, 6))
    for _, row, of_key in rows_of(weights, groups):
        for mine in (of_key == 0, of_key == 1):
            row[mine] *= 0.5 if row[mine].sum() > 0.5 else 1
    for impl in IMPLS:
        close(grouped_mass_attention(q, k, v, groups, rule=Halve(), impl=impl)[0], times_values(weights, v), msg=impl)


# What is chosen, and what is refused


def test_what_is_chosen():
    assert "reference" in explain(Call(torch.device("cpu"), torch.float32)).others
    assert explain(Call(torch.device("cpu"), torch.float32, grad=True)).chosen == "torch"
    assert explain(Call(torch.device("cuda"), torch.float64)).chosen == "torch"


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_ids": torch.zeros(1, 4).long()}, r"group_ids must have shape \(1, 5\); found \(1, 4\)"),
        ({"group_ids": torch.zeros(1, 2, 5).long()}, r"group_ids must have shape \(1, 4, 5\); found \(1, 2, 5\)"),
        ({"group_ids": torch.full((1, 5), 4)}, r"group_ids must be 0\.\.3; found 4\.\.4"),
        ({"group_ids": torch.zeros(1, 5)}, "group_ids must be integer; found torch.float32"),
        ({"rule": "vra"}, "rule must be 'neutral' or a Rule; found 'vra'"),
        ({"rule": Neutral(9)}, r"a rule has 1\.\.8 groups; found 9"),
        ({"rule": Static(torch.ones(3, 4))}, r"gains must have 1 or 4 heads; found 3"),
        ({"rule_grad": "none"}, "rule_grad must be 'full' or 'stop'; found 'none'"),
        ({"row_sel": torch.ones(1, 4).bool()}, r"row_sel must have shape \(1, 5\)"),
        ({"row_sel": torch.ones(1, 5)}, "row_sel must be bool; found torch.float32"),
        ({"gamma": torch.zeros(4)}, r"gamma must have shape \(4, 4\); found \(4,\)"),
        ({"beta": torch.full((4, 4), -torch.inf)}, "beta must be finite; found -inf"),
        ({"key_bias": torch.zeros(5)}, r"key_bias must have shape \(1, 4, 5\); found \(5,\)"),
        ({"key_bias": torch.full((1, 1, 5), torch.nan)}, "key_bias must be finite; found nan"),
        ({"impl": "cuda"}, "impl must be one of auto, .*reference; found 'cuda'"),
        ({"window": 3}, "unknown keyword 'window'"),
    ],
)
def test_bad_input_is_named(change, message):
    args = {"q": torch.zeros(1, 4, 5, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)}
    args |= {"group_ids": torch.zeros(1, 5).long()} | change
    with pytest.raises(TypeError if "window" in change else ValueError, match=message):
        grouped_mass_attention(**args)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Static(torch.tensor(1.0)), r"gains must be \[groups\] or \[heads, groups\]; found \(\)"),
        (lambda: Redistribution(0.5, (0,), (4,)), r"groups must be 0\.\.3; found \[0, 4\]"),
        (lambda: Redistribution(0.5, (0,), (0, 1)), r"must share no group, .* found \(0,\), \(0, 1\)"),
        (lambda: Redistribution(0.5, (0,), ()), "target must not be empty"),
        (lambda: Redistribution(1.5, (0,), (1,)), r"taken must be 0\.\.1; found 1\.5"),
        (lambda: MassFloor(0.5, group=4), r"group must be 0\.\.3; found 4"),
        (lambda: MassFloor(1.5), r"least must be 0\.\.1; found 1\.5"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
