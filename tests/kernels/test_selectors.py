"""Selectors of blocks: their invariants, and each published pattern against loops over its definition."""

from itertools import pairwise
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from vlm.kernels.selectors.biformer import biformer
from vlm.kernels.selectors.blocks import means
from vlm.kernels.selectors.dhsa import dhsa
from vlm.kernels.selectors.moba import moba
from vlm.kernels.selectors.order import Order, boxes
from vlm.kernels.selectors.power import power
from vlm.kernels.selectors.s2 import s2
from vlm.kernels.selectors.stochastic import stochastic
from vlm.kernels.selectors.vmoba import SCOPES, partition, vmoba
from vlm.kernels.sparse import block_sparse_attention
from vlm.kernels.sparse.lists import check
from vlm.kernels.visibility import visibility

CAUSAL = {
    "moba": lambda q, k, **common: moba(q, k, block=4, topk=2, **common),
    "dhsa": lambda q, k, **common: dhsa(q, k, row_block=6, key_block=4, density=0.4, **common),
    "s2": lambda q, k, **common: s2(q, k, block=4, local=2, stride=3, **common),
    "power": lambda q, k, **common: power(q, k, block=3, window=1, **common),
}
# the budget from 1 up; at `DENSE` it covers every block
BUDGETED = {
    "moba": lambda q, k, n: (moba(q, k, block=4, topk=n), None),
    "dhsa": lambda q, k, n: (dhsa(q, k, row_block=6, key_block=4, density=n / 9), None),
    "s2": lambda q, k, n: (s2(q, k, block=4, local=n, stride=50, offset=1), None),
    "power": lambda q, k, n: (power(q, k, block=4, window=n), None),
    "stochastic": lambda q, k, n: stochastic(q, k, window=4 * n, block=4),
    "vmoba": lambda q, k, n: vmoba(q, k, grid=(1, 6, 6), box=(2, 2), topk=n),
    "vmoba by head": lambda q, k, n: vmoba(q, k, grid=(1, 6, 6), box=(2, 2), topk=n, scope="head_global"),
    "vmoba by threshold": lambda q, k, n: vmoba(q, k, grid=(4, 3, 3), box=(4, 1, 1), threshold=n / 9),
    "biformer": lambda q, k, n: biformer(q, k, grid=(6, 6), regions=3, topk=n),
}
DENSE = 9


def tensors(batch, heads, kv_heads, rows, keys=None):
    shape = lambda h, n: (batch, h, n, 6)  # noqa: E731
    q, k = (torch.randn(shape(heads, rows), dtype=torch.float64), shape(kv_heads, rows if keys is None else keys))
    return q, torch.randn(k, dtype=torch.float64), torch.randn(k, dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(sorted(CAUSAL)),
    st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    st.integers(1, 25),
    st.integers(0, 9),
    st.sampled_from(["none", "lengths", "left"]),
    st.integers(0, 9999),
)
def test_lists_of_causal_selectors(name, heads, rows, extra, padding, seed):
    """Ascending, unique, in range, nothing that cannot be seen, the own block, something wherever something is."""
    torch.manual_seed(seed)
    keys = rows + extra
    q, k, _ = tensors(2, *heads, rows, keys)
    common = {}
    if padding == "lengths":
        common = {"q_len": torch.tensor([rows, (rows + 1) // 2]), "k_len": torch.tensor([keys, keys // 2 + 1])}
    elif padding == "left":
        common = {"key_valid": torch.arange(keys) >= torch.tensor([[keys // 2], [0]])}
    lists = CAUSAL[name](q, k, **common)
    check(name, lists, 2, heads[0], rows, keys, q.device, True)  # ascending, unique, in range
    seen = visibility(name, 2, rows, keys, q.device, common).mask().expand(2, heads[0], -1, -1)  # [B,H,Q,K]
    listed = lists.mask(rows, keys).expand_as(seen)
    blocks = (lists.row_block, lists.key_block)
    table = lists.table().expand(2, heads[0], -1, -1)
    for i in range(table.shape[2]):
        for j in range(table.shape[3]):
            box = seen[:, :, i * blocks[0] : (i + 1) * blocks[0], j * blocks[1] : (j + 1) * blocks[1]]
            assert not (table[:, :, i, j] & ~box.flatten(2).any(-1)).any()
    something = seen.any(-1)
    assert (seen & listed).any(-1)[something].all()
    last = (seen * torch.arange(1, keys + 1)).amax(-1) - 1  # the last key a row sees: its own token
    assert listed.gather(3, last.clamp_min(0)[..., None])[..., 0][something].all()


@pytest.mark.parametrize("name", sorted(BUDGETED))
def test_a_larger_budget_keeps_what_a_smaller_one_kept(name):
    q, k, _ = tensors(2, 4, 2, 36)
    tables = [BUDGETED[name](q, k, n)[0].table() for n in range(1, DENSE + 1)]
    for small, large in pairwise(tables):
        assert not (small & ~large).any()
    assert tables[0].sum() < tables[-1].sum()


@pytest.mark.parametrize("name", sorted(BUDGETED))
def test_a_full_budget_is_dense_attention(name):
    q, k, v = tensors(2, 4, 2, 36)
    lists, order = BUDGETED[name](q, k, DENSE)
    causal = name in CAUSAL or name == "stochastic"
    common = {"causal": causal}
    if order is None:
        order = Order.of(torch.arange(36))
    elif causal:
        common |= {"q_pos": order.positions(2), "k_pos": order.positions(2)}
    out = order.undo(block_sparse_attention(*(order.apply(x) for x in (q, k, v)), lists, **common))
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*CAUSAL, "stochastic"])
@pytest.mark.parametrize("changed", [13, 24])
def test_no_row_knows_of_a_later_token(name, changed):
    """Changing a token changes no row before it; for DHSA, whose blocks choose together, no block of rows before it."""
    before, common = tensors(1, 4, 2, 30), {}
    after = [x.clone() for x in before]
    for x in after:
        x[:, :, changed:] = torch.randn_like(x[:, :, changed:]) * 9
    outs = []
    for q, k, v in (before, after):
        order = Order.of(torch.arange(30))
        if name == "stochastic":
            lists, order = stochastic(q, k, window=8, block=4)
            common = {"q_pos": order.positions(1), "k_pos": order.positions(1)}
        else:
            lists = CAUSAL[name](q, k)
        outs.append(order.undo(block_sparse_attention(*(order.apply(x) for x in (q, k, v)), lists, **common)))
    safe = changed // 6 * 6 if name == "dhsa" else changed
    torch.testing.assert_close(outs[0][:, :, :safe], outs[1][:, :, :safe], rtol=0, atol=1e-12)
    assert not torch.allclose(outs[0], outs[1])


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_padding_changes_no_choice(name):
    """Right and left padding: the rows of a padded sample choose what they choose alone."""
    q, k, _ = tensors(1, 4, 2, 24)
    alone = CAUSAL[name](q, k).mask(24, 24)
    padded = [torch.cat((x, torch.full_like(x[:, :, :12], 50.0)), 2) for x in (q, k)]
    lists = CAUSAL[name](*padded, q_len=torch.tensor([24]), k_len=torch.tensor([24]))
    right = lists.mask(36, 36)[:, :, :24, :24]
    if name == "dhsa":  # its budget is a share of all blocks, padding too
        lists = dhsa(
            *padded, row_block=6, key_block=4, density=0.4 * 6 / 9, q_len=torch.tensor([24]), k_len=torch.tensor([24])
        )
        right = lists.mask(36, 36)[:, :, :24, :24]
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    assert torch.equal(right & causal, alone & causal)
    if name in ("moba", "dhsa"):  # the others go by distance from key 0, padding included
        padded = [torch.cat((torch.full_like(x[:, :, :12], 50.0), x), 2) for x in (q, k)]
        valid = {"key_valid": torch.arange(36)[None] >= 12}
        lists = (
            CAUSAL[name](*padded, **valid)
            if name == "moba"
            else dhsa(*padded, row_block=6, key_block=4, density=0.25, **valid)
        )
        left = lists.mask(36, 36)[:, :, 12:, 12:]
        assert torch.equal(left & causal, alone & causal)


@pytest.mark.parametrize("name", ["moba", "s2", "power"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_last_rows_choose_as_in_the_whole_sequence(name, rows):
    """Decoding: rows that do not start at a block."""
    q, k, _ = tensors(2, 4, 2, 22)
    whole = CAUSAL[name](q, k).mask(22, 22)[:, :, -rows:]
    part = CAUSAL[name](q[:, :, -rows:], k).mask(rows, 22)
    causal = torch.ones(22, 22, dtype=torch.bool).tril()[-rows:]
    assert torch.equal(part & causal, whole & causal)


# Each pattern against loops over its definition


def test_moba_by_loops():
    q, k, _ = tensors(2, 4, 2, 22)
    got = moba(q, k, block=4, topk=3).table()
    for b in range(2):
        for h in range(4):
            for i in range(22):
                own = i // 4
                gates = {j: float(q[b, h, i] @ k[b, h // 2, j * 4 : j * 4 + 4].mean(0)) for j in range(own)}
                wanted = {own, *sorted(gates, key=lambda j: -gates[j])[:2]}
                assert set(got[b, h, i].nonzero()[:, 0].tolist()) == wanted


def test_dhsa_by_loops():
    q, k, _ = tensors(2, 4, 2, 29)
    got = dhsa(q, k, row_block=6, key_block=4, density=0.6).table()
    budget = ceil(0.6 * 8)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                rows = range(6 * i, min(29, 6 * i + 6))
                forced = {0, *(row // 4 for row in rows)}
                query = q[b, h, rows.start : rows.stop].mean(0)
                score = {j: float(query @ k[b, h // 2, 4 * j : 4 * j + 4].mean(0)) for j in range(max(forced) + 1)}
                others = sorted(score.keys() - forced, key=lambda j: -score[j])[: max(0, budget - len(forced))]
                assert set(got[b, h, i].nonzero()[:, 0].tolist()) == forced | set(others)


@pytest.mark.parametrize("causal", [True, False])
def test_s2_by_loops(causal):
    """The pattern of dkernel's `get_sparse_attn_mask`, written out."""
    q, k, _ = tensors(1, 6, 3, 60)
    for stride, offset, dense_heads in ((4, 0, 0), (3, 1, 1), (12, 5, 0)):
        lists = s2(q, k, block=4, local=2, stride=stride, offset=offset, dense_heads=dense_heads, causal=causal)
        got = lists.table().expand(1, 6, -1, -1)
        for h in range(6):
            key_head, step = h // 2, max(1, stride // 6)
            for i in range(15):
                for j in range(15):
                    if causal:
                        wanted = i - j < 2 or (j + key_head * step + offset) % stride == 0
                    else:
                        wanted = (max(0, i - j - 1) + max(0, j - i - 1)) % stride == 0
                    wanted = (wanted or key_head >= 3 - dense_heads) and (j <= i or not causal)
                    assert bool(got[0, h, i, j]) == wanted


def test_power_reaches_twice_as_far_with_every_layer():
    q, k, _ = tensors(1, 1, 1, 64)
    layer = power(q, k, block=1, window=1, first=0).table()[0, 0]
    for i in range(64):
        wanted = {i, *(i - 2**m for m in range(7) if 2**m <= i)}
        assert set(layer[i].nonzero()[:, 0].tolist()) == wanted
    reach = torch.eye(64)
    for depth in range(1, 7):
        reach = ((layer.float() @ reach) > 0).float()
        near = torch.arange(64)[:, None] - torch.arange(64)
        assert reach[(near >= 0) & (near < 2**depth)].all()


def test_stochastic_sees_a_window_of_its_random_order():
    q, k, v = tensors(1, 2, 2, 22)
    lists, order = stochastic(q, k, window=8, block=4, seed=3)
    assert sorted(order.forward.tolist()) == list(range(22))
    assert torch.equal(order.undo(order.apply(q)), q)
    at = order.positions(1)
    out = order.undo(block_sparse_attention(*(order.apply(x) for x in (q, k, v)), lists, q_pos=at, k_pos=at))
    mask = torch.zeros(22, 22, dtype=torch.bool)
    for i in range(22):
        for j in range(22):
            places = int(order.inverse[i]) // 4 - int(order.inverse[j]) // 4
            mask[i, j] = j <= i and places in (0, 1, -5)  # its own block or the one before, in a ring of 6
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    again, other = stochastic(q, k, window=8, block=4, seed=3)[1], stochastic(q, k, window=8, block=4, seed=4)[1]
    assert torch.equal(again.forward, order.forward) and not torch.equal(other.forward, order.forward)


def test_biformer_gathers_regions_as_its_definition():
    """Against the definition: each region's tokens attend to all tokens of its best regions, heads routed together."""
    q, k, v = tensors(2, 2, 2, 24)
    grid, regions, topk = (6, 4), 2, 2
    lists, order = biformer(q, k, grid=grid, regions=regions, topk=topk)
    scale = 12**-0.5
    ordered = (order.apply(x) for x in (q, k, v))
    out = order.undo(block_sparse_attention(*ordered, lists, causal=False, scale=scale))
    number = torch.tensor([[y // 3 * 2 + x // 2 for x in range(4)] for y in range(6)]).flatten()
    for b in range(2):
        together = lambda x: x[b].transpose(0, 1).flatten(1)  # noqa: B023, E731  tokens, heads * dim
        mean = lambda x: torch.stack([together(x)[number == r].mean(0) for r in range(4)])  # noqa: B023, E731
        affinity = mean(q) @ mean(k).T
        for r in range(4):
            wanted = affinity[r].topk(topk).indices
            keys = torch.isin(number, wanted)
            expected = scaled_dot_product_attention(q[b, :, number == r], k[b, :, keys], v[b, :, keys], scale=scale)
            torch.testing.assert_close(out[b, :, number == r], expected, rtol=0, atol=1e-12)


def vmoba_by_loops(gates, own, scope, topk, threshold):
    """{(head, row, block)} chosen from gates [heads, rows, blocks] and the own block of each row."""
    heads, rows, blocks = gates.shape
    scopes = {}
    for h in range(heads):
        for i in range(rows):
            for j in range(blocks):
                key = {"query_head": (h, i), "head_global": h, "overall": 0, "block": j}[scope]
                scopes.setdefault(key, []).append((h, i, j))
    chosen = set()
    for members in scopes.values():
        values = {m: float(gates[m]) for m in members}
        mine = {m for m in members if own[m[1]] == m[2]}
        others = sorted((m for m in members if m not in mine), key=lambda m: -values[m])
        if topk is not None:
            count = topk * len(members) // blocks
            chosen |= mine | set(others[: max(0, count - len(mine))])
            continue
        low, high = min(values.values()), max(values.values())
        share = {m: (values[m] - low) / (high - low) for m in members}
        total, reached = sum(share.values()), sum(share[m] for m in mine)
        chosen |= mine
        for rank, m in enumerate(others):
            if rank and reached / total >= threshold:
                break
            chosen.add(m)
            reached += share[m]
    return chosen


BY_THRESHOLD = [(scope, None, threshold) for scope in SCOPES for threshold in (0.25, 0.6)]


@pytest.mark.parametrize(("scope", "topk", "threshold"), [*BY_THRESHOLD, *((scope, 2, 0) for scope in SCOPES[:3])])
def test_vmoba_by_loops(scope, topk, threshold):
    q, k, _ = tensors(2, 4, 2, 24)
    lists, order = vmoba(q, k, grid=(2, 3, 4), box=(1, 3, 2), topk=topk, threshold=threshold, scope=scope)
    q, k = order.apply(q), order.apply(k)
    for b in range(2):
        means_of = torch.stack([k[b, :, 6 * j : 6 * j + 6].mean(1) for j in range(4)], 1)  # [kv heads, blocks, dim]
        gates = q[b] @ means_of.repeat_interleave(2, 0).transpose(1, 2)
        wanted = vmoba_by_loops(gates, [i // 6 for i in range(24)], scope, topk, threshold)
        assert {tuple(m) for m in lists.table()[b].nonzero().tolist()} == wanted


def test_vmoba_boxes():
    """Tokens of a box lie together: by coordinates, for the three partitions."""
    grid = (4, 6, 4)
    place = [(t, y, x) for t in range(4) for y in range(6) for x in range(4)]
    for box, size in (((3, 2), (4, 3, 2)), ((2, 3, 4), (2, 3, 4))):
        order, tokens = partition(grid, box, torch.device("cpu"))
        assert tokens == size[0] * size[1] * size[2]
        box_of = [tuple(c // s for c, s in zip(place[t], size, strict=True)) for t in order.forward.tolist()]
        for start in range(0, len(place), tokens):
            assert len(set(box_of[start : start + tokens])) == 1
        assert box_of == sorted(box_of)
    order, tokens = partition(grid, 0.5, torch.device("cpu"))
    assert tokens == 12 and order.forward.tolist() == list(range(96))


def test_boxes_are_row_major_inside_too():
    assert boxes("test", (2, 4), (2, 2), torch.device("cpu")).forward.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_means_leave_padding_out():
    x = torch.tensor([[[[1.0], [3.0], [5.0], [100.0], [7.0]]]])
    assert means(x, 2, None).flatten().tolist() == [2.0, 52.5, 7.0]
    x[:, :, 3:] = torch.nan
    valid = torch.tensor([[True, True, True, False, False]])
    assert means(x, 2, valid).flatten().tolist() == [2.0, 5.0, 0.0]


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda q: moba(q, q, causal=False), "moba: causal must be True; found False"),
        (lambda q: moba(q, q, block=0), "moba: keys of a block must be 1 or more; found 0"),
        (lambda q: moba(q, q, topk=0), "moba: topk must be 1 or more; found 0"),
        (lambda q: biformer(q, q, grid=(3, 4), topk=0), "biformer: topk must be 1 or more; found 0"),
        (lambda q: dhsa(q, q, first=-1), "dhsa: first must be 0 or more; found -1"),
        (lambda q: dhsa(q, q, density=1.5), r"dhsa: density must be 0\.\.1; found 1.5"),
        (lambda q: power(q, q, window=0), "power: window must be 1 or more; found 0"),
        (lambda q: s2(q, q, stride=0), "s2: stride must be 1 or more; found 0"),
        (lambda q: s2(q, q, dense_heads=3), r"s2: dense_heads must be 0\.\.2; found 3"),
        (lambda q: moba(q, q, q_pos=torch.zeros(1, 12).int(), k_pos=torch.zeros(1, 12).int()), "q_pos must be None"),
        (lambda q: power(q, q, q_doc=torch.zeros(1, 12).int(), k_doc=torch.zeros(1, 12).int()), "q_doc must be None"),
        (lambda q: stochastic(q, q, window=100, block=64), "window must be a multiple of block, 64; found 100"),
        (lambda q: stochastic(q, q[:, :, 1:]), "q and k must be as long as each other; found 12, 11"),
        (lambda q: biformer(q, q, grid=(3, 5)), r"grid \(3, 5\) has 15 tokens; found 12 rows, 12 keys"),
        (lambda q: biformer(q, q, grid=(3, 4), regions=2), "must be a multiple of regions on both sides; found 2"),
        (lambda q: vmoba(q, q, grid=(1, 3, 5), box=1), r"grid \(1, 3, 5\) has 15 tokens; found 12 rows"),
        (lambda q: vmoba(q, q, grid=(1, 3, 4), box=(2, 2)), r"\(1, 3, 4\) cannot be cut into boxes of \(1, 2, 2\)"),
        (lambda q: vmoba(q, q, grid=(1, 3, 4), box=0.01), r"box must hold a token or more; found 0\.01 frames"),
        (lambda q: vmoba(q, q, grid=(1, 3, 4), box=1, scope="x"), "scope must be one of query_head, .*; found 'x'"),
        (lambda q: vmoba(q, q, grid=(1, 3, 4), box=1, topk=1, scope="block"), "overall; found 'block'"),
        (lambda q: vmoba(q, q, grid=(1, 3, 4), box=1, topk=0), "topk must be 1 or more; found 0"),
    ],
)
def test_bad_input_is_named(select, message):
    with pytest.raises(ValueError, match=message):
        select(torch.zeros(1, 2, 12, 8))
