"""Block-sparse attention against dense attention with a mask written out pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vlm.kernels.dispatch import Call
from vlm.kernels.sparse import block_sparse_attention, explain, gather
from vlm.kernels.sparse.flex import block_mask
from vlm.kernels.sparse.lists import BlockLists, check
from vlm.kernels.visibility import visibility

IMPLS = ["reference", "torch", "flex"]


def tensors(batch, heads, kv_heads, rows, keys, dtype=torch.float64):
    shapes = (batch, heads, rows, 6), (batch, kv_heads, keys, 6), (batch, kv_heads, keys, 5)
    return tuple(torch.randn(*shape, dtype=dtype) for shape in shapes)


def random_lists(shape, row_block, key_block, share=0.5):
    return BlockLists.from_table(torch.rand(shape) < share, row_block, key_block)


def listed_pairs(lists, batch, heads, rows, keys):
    """[batch, heads, rows, keys] bool, pair by pair from count and index alone."""
    mask = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            of = (b % lists.count.shape[0], h % lists.count.shape[1])
            for i in range(rows):
                place = (*of, i // lists.row_block)
                for j in lists.index[place][: int(lists.count[place])].tolist():
                    mask[b, h, i, j * lists.key_block : (j + 1) * lists.key_block] = True
    return mask


def dense(q, k, v, mask):
    """(out, log-sum-exp) by a plain softmax, 0 and -inf in rows without a key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    st.integers(1, 13),
    st.integers(-3, 6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_equals_masked_dense_attention(heads, rows, extra, row_block, key_block, causal, shared, seed):
    torch.manual_seed(seed)
    keys = max(1, rows + extra)
    q, k, v = tensors(2, *heads, rows, keys)
    lists = random_lists(
        (2, 1 if shared else heads[0], -(-rows // row_block), -(-keys // key_block)), row_block, key_block
    )
    k_len, q_len = torch.randint(0, keys + 1, (2,)), torch.randint(0, rows + 1, (2,))
    mask = listed_pairs(lists, 2, heads[0], rows, keys)
    for b in range(2):
        for i in range(rows):
            end = i + int(k_len[b] - q_len[b]) if causal else keys
            mask[b, :, i, max(0, min(int(k_len[b]), end + 1)) if i < q_len[b] else 0 :] = False
    expected, expected_lse = dense(q, k, v, mask)
    for impl in IMPLS:
        out, lse = block_sparse_attention(
            q, k, v, lists, causal=causal, q_len=q_len, k_len=k_len, return_lse=True, impl=impl
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("blocks", [(4, 4), (1, 8), (16, 4)])
def test_all_blocks_are_dense_attention(impl, causal, blocks):
    q, k, v = tensors(2, 4, 2, 30, 30)
    lists = random_lists((1, 1, -(-30 // blocks[0]), -(-30 // blocks[1])), *blocks, share=2)
    assert lists.density() == 1
    out = block_sparse_attention(q, k, v, lists, causal=causal, impl=impl)
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_head_map_positions_and_packed_samples(impl):
    q, k, v = tensors(1, 3, 2, 12, 12)
    lists = random_lists((1, 3, 4, 3), 3, 4, share=0.7)
    head_map, order = torch.tensor([1, 0, 1]), torch.randperm(12)
    document = torch.tensor([[0] * 5 + [1] * 7])
    mask = listed_pairs(lists, 1, 3, 12, 12) & (order[:, None] >= order) & (document[0][:, None] == document[0])
    expected, _ = dense(q, k[:, head_map], v[:, head_map], mask)
    at = {"q_pos": order[None], "k_pos": order[None], "q_doc": document, "k_doc": document}
    out = block_sparse_attention(q, k, v, lists, impl=impl, kv_head_of=head_map, **at)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [(3, 2), (1, 4)])  # rows gather keys, keys gather rows
def test_gradients_of_the_torch_version(blocks):
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 1, 7, 9))
    table = torch.rand(2, 2, -(-7 // blocks[0]), -(-9 // blocks[1])) < 0.5
    table[0, 0, 1] = False  # rows that see nothing
    lists = BlockLists.from_table(table, *blocks)

    def run(q, k, v):
        out, lse = block_sparse_attention(q, k, v, lists, return_lse=True, impl="torch", k_len=torch.tensor([9, 6]))
        return out, lse.masked_fill(lse.isinf(), 0)

    assert run(q, k, v)[1].eq(0).any()
    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_gradients_of_the_reference():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 1, 5, 6))
    lists = BlockLists.from_table(torch.tensor([[[[True, False], [False, False], [True, True]]]]), 2, 3)
    run = lambda q, k, v: block_sparse_attention(q, k, v, lists, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("blocks", [(4, 4), (1, 4)])
def test_the_torch_version_touches_only_listed_blocks(blocks):
    q, k, v = tensors(1, 2, 2, 16, 16)
    table = torch.zeros(1, 1, 16 // blocks[0], 4, dtype=torch.bool)
    table[..., [0, 2]] = True
    k[:, :, 4:8] = v[:, :, 12:] = torch.nan  # key blocks 1 and 3
    lists = BlockLists.from_table(table, *blocks)
    assert block_sparse_attention(q, k, v, lists, causal=False, impl="torch").isfinite().all()


@pytest.mark.parametrize("blocks", [(4, 4), (1, 4)])
def test_steps_of_any_size_give_the_same(blocks, monkeypatch):
    q, k, v = tensors(2, 2, 1, 21, 21)
    lists = random_lists((2, 2, -(-21 // blocks[0]), 6), *blocks)
    whole = block_sparse_attention(q, k, v, lists, return_lse=True, impl="torch")
    monkeypatch.setattr(gather, "CHUNK", 1)
    for one, all_at_once in zip(
        block_sparse_attention(q, k, v, lists, return_lse=True, impl="torch"), whole, strict=True
    ):
        torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [(4, 4), (1, 4)])
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0)])
def test_no_rows_or_no_keys(blocks, rows, keys):
    q, k, v = tensors(1, 2, 1, rows, keys)
    lists = random_lists((1, 1, -(-rows // blocks[0]), -(-keys // blocks[1])), *blocks)
    for impl in IMPLS:
        out, lse = block_sparse_attention(q, k, v, lists, return_lse=True, impl=impl)
        assert out.shape == (1, 2, rows, 5) and (out == 0).all() and (lse == -torch.inf).all()


def test_half_precision_sums_in_fp32():
    q, k, v = tensors(1, 2, 1, 40, 40, torch.float32)
    for blocks in ((8, 8), (1, 8)):
        lists = random_lists((1, 2, -(-40 // blocks[0]), 5), *blocks, share=0.6)
        exact, exact_lse = block_sparse_attention(
            *(x.bfloat16().double() for x in (q, k, v)), lists, return_lse=True, impl="reference"
        )
        out, lse = block_sparse_attention(*(x.bfloat16() for x in (q, k, v)), lists, return_lse=True, impl="torch")
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.02)  # bf16 has 8 bits
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("blocks", [(48, 80), (64, 128), (1, 96), (256, 256)])
def test_tiles_for_flex_hold_every_listed_pair_and_full_ones_nothing_else(causal, padded, blocks):
    """What compiled FlexAttention would visit: it masks inside partial tiles and never inside full ones."""
    rows, keys = 300, 420
    lists = random_lists((2, 1, -(-rows // blocks[0]), -(-keys // blocks[1])), *blocks, share=0.8)
    padding = {"k_len": torch.tensor([420, 130])} if padded else {}
    seen = visibility("test", 2, rows, keys, torch.device("cpu"), {"causal": causal, **padding})
    wanted = listed_pairs(lists, 2, 1, rows, keys) & seen.mask()
    mask = block_mask(seen, lists, 2)
    visited, unmasked = (torch.zeros(2, 1, 384, 512, dtype=torch.bool) for _ in range(2))
    for count, index, where in (
        (mask.kv_num_blocks, mask.kv_indices, visited),
        (mask.full_kv_num_blocks, mask.full_kv_indices, unmasked),
    ):
        for b in range(2):
            for i in range(3):
                for j in index[b, 0, i][: int(count[b, 0, i])].tolist():
                    where[b, :, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = True
    assert not (visited & unmasked).any()
    assert not (wanted & ~(visited | unmasked)[..., :rows, :keys]).any()
    assert not (unmasked[..., :rows, :keys] & ~wanted).any()
    assert not unmasked[..., rows:, :].any() and not unmasked[..., keys:].any()
    if not causal and not padded and blocks[0] > 1:
        assert unmasked.any()  # or the test says nothing of them


@pytest.mark.slow
def test_compiled_flex_reads_the_lists():
    """Compiled, FlexAttention visits the tiles of the lists; uncompiled it looks at the mask function alone."""
    q, k, v = (torch.randn(2, heads, 300, 16) for heads in (4, 2, 2))
    lists = random_lists((2, 4, 3, 2), 100, 256, share=0.6)
    mask = block_mask(visibility("test", 2, 300, 300, q.device, {"causal": False}), lists, 2)
    assert mask.full_kv_num_blocks.any() and mask.kv_num_blocks.any()
    run = torch.compile(flex_attention, fullgraph=True)
    out = run(q, k, v, block_mask=mask, enable_gqa=True)
    expected = block_sparse_attention(q, k, v, lists, causal=False, impl="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
    mask.kv_num_blocks.zero_()
    mask.full_kv_num_blocks.zero_()
    assert (run(q, k, v, block_mask=mask, enable_gqa=True) == 0).all()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(0, 999),
)
def test_lists_tables_transposes_and_tiles(rows, keys, row_block, key_block, tile, seed):
    torch.manual_seed(seed)
    table = torch.rand(2, 3, -(-rows // row_block), -(-keys // key_block)) < 0.5
    lists = BlockLists.from_table(table, row_block, key_block)
    check("test", lists, 2, 3, rows, keys, table.device, True)
    assert torch.equal(lists.table(), table)
    assert torch.equal(lists.transposed().table(), table.transpose(2, 3))
    assert lists.density() == pytest.approx(table.float().mean().item())
    mask = listed_pairs(lists, 2, 3, rows, keys)
    assert torch.equal(lists.mask(rows, keys), mask)
    some, full = lists.tiles(rows, keys, tile)
    for i in range(-(-rows // tile)):
        for j in range(-(-keys // tile)):
            inside = mask[:, :, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile].flatten(2)
            assert torch.equal(some[:, :, i, j], inside.any(-1)) and torch.equal(full[:, :, i, j], inside.all(-1))


def test_lists_from_ids_in_any_order():
    ids = torch.tensor([[[[3, 0, -1], [1, 1, 1], [-1, -1, -1]]]])
    lists = BlockLists.from_ids(ids, key_blocks=4, row_block=2, key_block=2)
    assert lists.count.tolist() == [[[2, 1, 0]]]
    assert lists.index[0, 0, 0, :2].tolist() == [0, 3] and lists.index[0, 0, 1, 0] == 1
    with pytest.raises(ValueError, match=r"ids must be -1\.\.1; found -1\.\.3"):
        BlockLists.from_ids(ids, key_blocks=2, row_block=2, key_block=2)


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_block": 0}, "1 or more rows and keys; found 0 x 2"),
        ({"row_block": 1}, r"lists.count must end in \(4,\), blocks of 1 rows and 2 keys over 4 rows and 6 keys"),
        ({"key_block": 3}, r"lists.index must end in \(2, 2\)"),
        ({"count": torch.tensor([[[4, 0]]])}, r"lists.count must be 0\.\.3; found 0\.\.4"),
        ({"count": torch.tensor([[[1, 0]], [[1, 0]]])}, r"lists.count must have shape .*; found \(2, 1, 2\)"),
        ({"index": torch.tensor([[[[0, 3, 1], [0, 1, 2]]]])}, r"lists.index must be 0\.\.2; found 3"),
        (
            {"index": torch.tensor([[[[2, 1, 0], [0, 1, 2]]]])},
            r"must rise within each list; found \[2, 1\] at \(0, 0, 0\)",
        ),
        ({"index": torch.tensor([[[[1, 1, 0], [0, 1, 2]]]])}, r"must rise within each list; found \[1, 1\]"),
    ],
)
def test_bad_lists_are_named(change, message):
    fields = {
        "count": torch.tensor([[[2, 1]]]),
        "index": torch.arange(3).expand(1, 1, 2, 3),
        "row_block": 2,
        "key_block": 2,
    }
    fields |= change
    fields["count"], fields["index"] = fields["count"].int(), fields["index"].int()
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, k, BlockLists(**fields))


def test_which_implementation_runs_where():
    q = torch.zeros(1, 2, 4, 8)
    here = explain(Call.of(q, q, q))
    assert here.chosen == "torch" and "score matrix" in here.others["flex"]
    on_gpu = Call(torch.device("cuda"), torch.bfloat16, grad=True, dim=64, value_dim=64)
    assert explain(on_gpu).chosen == "flex"


def test_other_bad_input_is_named():
    q, lists = torch.zeros(1, 2, 4, 8), random_lists((1, 1, 2, 2), 2, 2)
    with pytest.raises(ValueError, match="impl must be one of auto, flex, torch, reference; found 'x'"):
        block_sparse_attention(q, q, q, lists, impl="x")
    with pytest.raises(ValueError, match="no backward on a CPU"):
        block_sparse_attention(q.requires_grad_(), q, q, lists, impl="flex")
    wide = BlockLists(lists.count.long(), lists.index, 2, 2)
    with pytest.raises(ValueError, match=r"lists\.count must be int32"):
        block_sparse_attention(q, q, q, wide)
