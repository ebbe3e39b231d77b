"""States of parts of the keys: put together they are attention over all the keys."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vlm.kernels.dense import dense_attention
from vlm.kernels.state import downdate_state, merge_states, shares

seeds = st.integers(0, 10_000)
DOUBLE = torch.float64


def random_states(seed: int, parts: int, dtype: torch.dtype = DOUBLE):
    """States of 2 x 5 rows; about every fifth row of a part is empty."""
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(parts, 2, 5, 3, generator=g, dtype=DOUBLE)
    lse = 3 * torch.randn(parts, 2, 5, generator=g, dtype=DOUBLE)
    empty = torch.rand(parts, 2, 5, generator=g) < 0.2
    out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
    return [(o.to(dtype), log) for o, log in zip(out, lse, strict=True)]


def close(got, expected, atol=1e-12):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@settings(deadline=None, max_examples=15)
@given(seeds, st.lists(st.integers(1, 12), max_size=4, unique=True), st.booleans())
def test_all_tiles_of_the_keys_merge_to_dense_attention(seed, cuts, causal):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 5, 6, generator=g, dtype=DOUBLE)
    k, v = torch.randn(2, 2, 2, 13, 6, generator=g, dtype=DOUBLE)
    edges = [0, *sorted(cuts), 13]
    q_pos, k_pos = torch.arange(8, 13).expand(2, -1), torch.arange(13).expand(2, -1)
    states = []
    for a, b in pairwise(edges):
        place = {"q_pos": q_pos, "k_pos": k_pos[:, a:b], "causal": causal}
        states.append(dense_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, **place))
    mask = torch.ones(5, 13, dtype=torch.bool).tril(8) if causal else torch.ones(5, 13, dtype=torch.bool)
    out, lse = merge_states(states)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask, enable_gqa=True), rtol=0, atol=1e-12)
    scores = (q @ k.repeat_interleave(2, 1).mT / 6**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 6))
def test_neither_order_nor_grouping_matters(seed, parts):
    states = random_states(seed, parts)
    together = merge_states(states)
    close(merge_states(states[::-1]), together)
    split = 1 + seed % (parts - 1)
    close(merge_states([merge_states(states[:split]), merge_states(states[split:])]), together)
    close(merge_states(states[:1]), states[0])
    nothing = (torch.zeros_like(states[0][0]), torch.full_like(states[0][1], -torch.inf))
    close(merge_states([nothing, *states, nothing]), together)
    close(merge_states([nothing, nothing]), nothing)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_downdate_undoes_a_merge(seed):
    rest, part = merge_states(random_states(seed, 2)), merge_states(random_states(seed + 1, 2))
    full = merge_states([rest, part])
    remains = torch.where(rest[1].isneginf(), 1, (rest[1] - full[1]).exp())
    close(downdate_state(full, part), rest, atol=1e-13 / float(remains.min()))
    close(downdate_state(full, full), (torch.zeros_like(rest[0]), torch.full_like(rest[1], -torch.inf)))


def test_a_gate_counts_a_part_that_many_times():
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=DOUBLE)
    part = lambda keys: dense_attention(q, k[:, :, keys], v[:, :, keys], return_lse=True, causal=False)  # noqa: E731
    gated = merge_states([part([0, 1, 2]), (*part([3, 4]), torch.tensor(3.0).log())])
    close(gated, part([0, 1, 2] + 3 * [3, 4]), atol=1e-7)
    ignored = merge_states([part([0, 1, 2]), (*part([3, 4]), torch.tensor(-torch.inf))])
    close(ignored, part([0, 1, 2]))


def test_landmark_attention_is_a_merge_with_log_weights_put_in():
    """Mohtashami and Jaggi (2023): a block's keys share the weight that its landmark gets among the local keys."""
    q, local, landmarks = torch.randn(6, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)
    blocks, values = torch.randn(3, 5, 6, dtype=DOUBLE), torch.randn(3, 5, 2, dtype=DOUBLE)
    local_values = torch.randn(4, 2, dtype=DOUBLE)
    top = torch.cat([local @ q, landmarks @ q]).softmax(0)
    expected = top[:4] @ local_values
    for block in range(3):
        expected = expected + top[4 + block] * ((blocks[block] @ q).softmax(0) @ values[block])
    states = [((local @ q).softmax(0) @ local_values, (local @ q).logsumexp(0))]
    states += [((blocks[n] @ q).softmax(0) @ values[n], landmarks[n] @ q) for n in range(3)]
    torch.testing.assert_close(merge_states(states)[0], expected, rtol=0, atol=1e-14)


def test_gradients_are_exact_and_finite_beside_empty_states():
    states = random_states(3, 3)
    empty = torch.zeros(2, 5, dtype=torch.bool)
    empty[0, 0] = empty[1, 3] = True  # in every part
    outs = [out.masked_fill(empty[..., None], 0).requires_grad_() for out, _ in states]
    hidden = [log.isneginf() | empty for _, log in states]
    logs = [log.masked_fill(gone, 0).requires_grad_() for (_, log), gone in zip(states, hidden, strict=True)]
    gate = torch.randn(2, 1, dtype=DOUBLE, requires_grad=True)

    def given_states(args):
        logs = [x.masked_fill(gone, -torch.inf) for x, gone in zip(args[3:6], hidden, strict=True)]
        return [(args[0], logs[0]), (args[1], logs[1]), (args[2], logs[2], args[6])]

    def finite(state):
        return state[0], state[1].masked_fill(state[1].isneginf(), 0)

    inputs = (*outs, *logs, gate)
    assert torch.autograd.gradcheck(lambda *args: finite(merge_states(given_states(args))), inputs)

    def there_and_back(*args):
        first, second, _ = given_states(args)
        return finite(downdate_state(merge_states([first, second]), second))

    assert torch.autograd.gradcheck(there_and_back, (*inputs[:6], gate))


def test_gradient_through_parts_is_the_gradient_of_the_whole():
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    upstream, upstream_lse = torch.randn(1, 2, 6, 4, dtype=DOUBLE), torch.randn(1, 2, 6, dtype=DOUBLE)
    parts = [dense_attention(q, k[:, :, s], v[:, :, s], return_lse=True, causal=False) for s in (slice(2), slice(2, 6))]
    whole = dense_attention(q, k, v, return_lse=True, causal=False)
    for x, y in zip(
        torch.autograd.grad(merge_states(parts), (q, k, v), (upstream, upstream_lse)),
        torch.autograd.grad(whole, (q, k, v), (upstream, upstream_lse)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_states_of_half_precision_are_kept_in_fp32():
    states = random_states(0, 2, torch.bfloat16)
    out, lse = merge_states([(o, log.float()) for o, log in states])
    assert out.dtype == lse.dtype == torch.float32
    exact = merge_states([(o.double(), log) for o, log in states])
    close((out.double(), lse.double()), exact, atol=1e-5)
    rest = downdate_state((out, lse), (states[0][0], states[0][1].float()), validate=False)
    assert rest[0].dtype == rest[1].dtype == torch.float32


def test_shares_sum_to_one_or_nothing():
    logs = torch.tensor([[0.0, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf]], requires_grad=True)
    share, lse = shares(logs)
    torch.testing.assert_close(share.sum(0), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(lse, torch.tensor([logs[:, 0].logsumexp(0).item(), 2.0, -torch.inf]))
    share[0].sum().backward()
    assert logs.grad is not None
    assert logs.grad.isfinite().all()


def test_rows_that_cannot_be_taken_apart_are_refused():
    out = torch.zeros(2, 3)
    full, most = (out, torch.zeros(2)), (out, torch.tensor([-0.5, -0.01]))  # 0.39 and 0.00995 remain
    remaining = downdate_state(full, most)[1].exp()
    torch.testing.assert_close(remaining, torch.tensor([0.3935, 0.00995]), rtol=1e-3, atol=0)
    half = (out.bfloat16(), most[1])
    with pytest.raises(ValueError, match=r"at least 1/64 of a row's weight must remain; found 0\.01 .*these 1 rows"):
        downdate_state(full, half)
    torch.testing.assert_close(downdate_state(full, half, validate=False)[1].exp(), remaining)
    with pytest.raises(ValueError, match="part must be a part of full"):
        downdate_state(full, (out, torch.tensor([0.1, -1.0])))
    with pytest.raises(ValueError, match="part must be a part of full"):
        downdate_state((out, torch.tensor([-torch.inf, 0.0])), most)


@pytest.mark.bad_shape
def test_bad_states_are_named():
    state = (torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="states must hold one state or more; found none"):
        merge_states([])
    with pytest.raises(ValueError, match=r"states\[1\] must be \(out \(2, 3\), lse \(2,\)\); found \(2, 4\), \(2,\)"):
        merge_states([state, (torch.zeros(2, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"part must be .* found \(2, 3\), \(3,\)"):
        downdate_state(state, (torch.zeros(2, 3), torch.zeros(3)))
