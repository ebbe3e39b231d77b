"""Block-sparse attention by FlexAttention: compiled, only the listed tiles are visited.

Two traps of FlexAttention are met here. Uncompiled it ignores its block lists and looks at the mask function alone, so
that function looks every pair up in the table of the lists. And its kernels want blocks that their own tiles divide:
our lists, of any block size, are put on tiles of 128 x 128, which all of them divide; what a tile holds beside listed
pairs is masked.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlm.kernels.flex import TILE, Modifier, flex, grouped_heads
from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Operands, Visibility


def block_sparse_flex(x: Operands, lists: BlockLists) -> tuple[Tensor, Tensor]:
    k, v = grouped_heads(x)
    return flex(x.q, k, v, block_mask=block_mask(x.seen, lists, x.q.shape[0]), scale=x.scale)


def block_mask(seen: Visibility, lists: BlockLists, batch: int) -> BlockMask:
    """The lists and the visibility as FlexAttention takes them, built from the lists and never from a dense mask."""
    some, full = lists.tiles(seen.rows, seen.keys, TILE)
    full = full & _open(seen)
    part = BlockLists.from_table(some & ~full, TILE, TILE)
    whole = BlockLists.from_table(full, TILE, TILE)
    return BlockMask.from_kv_blocks(
        part.count,
        part.index,
        whole.count,
        whole.index,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=_mask_mod(seen, lists, batch),
        seq_lengths=(seen.rows, seen.keys),
    )


def _open(seen: Visibility) -> Tensor:
    """[row tiles, key tiles]: whole tiles whose every row sees every key, as far as indices alone can tell."""
    row = torch.arange(0, seen.rows, TILE, device=seen.device)[:, None]
    key = torch.arange(0, seen.keys, TILE, device=seen.device)
    if not seen.by_index:
        return torch.zeros(len(row), len(key), dtype=torch.bool, device=seen.device)
    whole = (row + TILE <= seen.rows) & (key + TILE <= seen.keys)
    return whole & (key + TILE - 1 <= row + seen.keys - seen.rows) if seen.causal else whole


def _mask_mod(seen: Visibility, lists: BlockLists, batch: int) -> Modifier:
    visible, table = seen.mask_mod(batch), lists.table()
    row_block, key_block = lists.row_block, lists.key_block
    by_sample, by_head = int(table.shape[0] > 1), int(table.shape[1] > 1)  # 0: one table for all
    listed = lambda b, h, i, j: table[b * by_sample, h * by_head, i // row_block, j // key_block]  # noqa: E731
    return lambda b, h, i, j: listed(b, h, i, j) & visible(b, h, i, j)
