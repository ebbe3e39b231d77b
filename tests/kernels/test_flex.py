"""Block masks worked out from ranges: they list every tile with a visible pair and call full only what is full."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from vlm.kernels import flex as module
from vlm.kernels.flex import block_mask, flex, mask_of
from vlm.kernels.visibility import visibility

CPU = torch.device("cpu")
KINDS = ("full", "q_len", "k_len", "hidden", "positions", "documents")


def listed(count: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    """[batch, heads, row tiles, key tiles]: the listed tiles as a table."""
    assert count is not None
    assert index is not None
    used = torch.arange(index.shape[-1]) < count[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter(-1, index.long(), used)


def spread(tiles: torch.Tensor, tile: int, rows: int, keys: int) -> torch.Tensor:
    return tiles.repeat_interleave(tile, -2).repeat_interleave(tile, -1)[..., :rows, :keys]


@settings(deadline=None, max_examples=120)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 11), st.integers(1, 11)),
    st.lists(st.sampled_from(KINDS), unique=True).map(tuple),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 10_000),
)
def test_lists_hold_every_visible_pair(draw_common, sees, size, kinds, member_heads, seed):
    batch, rows, keys = size
    common = draw_common(seed, *size, kinds)
    mask = sees(common, *size)[:, None]
    member = None
    if member_heads:
        member = torch.rand(batch, member_heads, keys, generator=torch.Generator().manual_seed(seed)) < 0.8
        mask = mask & member[:, :, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", 3)
        blocks = mask_of(visibility("op", *size, CPU, common), batch, member)
    if blocks is None:
        assert mask.all()
        return
    partial = spread(listed(blocks.kv_num_blocks, blocks.kv_indices), 3, rows, keys)
    full = spread(listed(blocks.full_kv_num_blocks, blocks.full_kv_indices), 3, rows, keys)
    assert not (partial & full).any()
    assert (partial | full | ~mask).all()
    assert (mask | ~full).all()
    b, h, i, j = (torch.arange(n).view([-1 if d == at else 1 for d in range(4)]) for at, n in enumerate((*mask.shape,)))
    assert torch.equal(blocks.mask_mod(b, h, i, j).expand(mask.shape), mask)
    assert blocks.shape[-2:] == (rows, keys)


def same_lists(ours: BlockMask | None, theirs: BlockMask) -> bool:
    assert ours is not None
    pairs = [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")]
    pairs += [("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")]
    return all(
        torch.equal(listed(*(getattr(ours, n) for n in names)), listed(*(getattr(theirs, n) for n in names)))
        for names in pairs
    )


@pytest.mark.parametrize(("rows", "keys"), [(640, 640), (384, 640), (300, 500)])
def test_causal_lists_are_those_that_pytorch_finds_pair_by_pair(rows, keys):
    seen = visibility("op", 1, rows, keys, CPU, {})
    assert same_lists(mask_of(seen, 1), create_block_mask(seen.mask_mod(1), None, None, rows, keys, device="cpu"))


def test_packed_lists_are_those_that_pytorch_finds_pair_by_pair():
    lengths = torch.tensor([[100, 200, 340], [256, 384, 0]])
    document = torch.stack([torch.repeat_interleave(torch.arange(3), each) for each in lengths])
    seen = visibility("op", 2, 640, 640, CPU, {"q_doc": document, "k_doc": document})
    ours = mask_of(seen, 2)
    assert same_lists(ours, create_block_mask(seen.mask_mod(2), 2, None, 640, 640, device="cpu"))
    assert same_lists(ours, block_mask(seen.mask_mod(2), 2, seen))


def test_no_mask_where_nothing_is_hidden():
    assert mask_of(visibility("op", 2, 5, 7, CPU, {"causal": False}), 2) is None


@pytest.mark.parametrize(("rows", "keys"), [(0, 3), (3, 0)])
def test_empty_sides(rows, keys):
    q, k = torch.zeros(1, 2, rows, 4), torch.zeros(1, 2, keys, 4)
    out, lse = flex(q, k, k.expand(1, 2, keys, 4))
    assert out.shape == (1, 2, rows, 4)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()
