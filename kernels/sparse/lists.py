"""Block lists: which blocks of keys each block of rows attends to."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Tiles(NamedTuple):
    """Which tiles of another size hold a listed pair of a row and a key, and which hold nothing else."""

    some: Bool[Tensor, "one_or_batch one_or_heads row_tiles key_tiles"]
    full: Bool[Tensor, "one_or_batch one_or_heads row_tiles key_tiles"]


@dataclass(frozen=True)
class BlockLists:
    """For every block of rows the blocks of keys it attends to. A batch or head dimension of 1 stands for all.

    count: how many key blocks are listed.
    index: their numbers, ascending, in the first ``count`` places; the places after hold the other numbers, unread.
    row_block, key_block: rows and keys of a block; the last block may be shorter.
    each: what every entry of ``count`` is, where that is known without a look at them: nobody waits for the GPU then,
        and a compiler follows what walks the lists.
    """

    count: Int[Tensor, "one_or_batch one_or_heads query_blocks"]
    index: Int[Tensor, "one_or_batch one_or_heads query_blocks key_blocks"]
    row_block: int
    key_block: int
    each: int | None = None

    @staticmethod
    def from_table(
        table: Bool[Tensor, "one_or_batch one_or_heads query_blocks key_blocks"],
        row_block: int,
        key_block: int,
        each: int | None = None,
    ) -> "BlockLists":
        """Lists of the True entries; ``each``: of which every row of the table has so many."""
        index = torch.argsort(table.to(torch.uint8), dim=-1, descending=True, stable=True)
        return BlockLists(table.sum(-1, dtype=torch.int32), index.to(torch.int32), row_block, key_block, each)

    @staticmethod
    def from_ids(
        ids: Int[Tensor, "one_or_batch one_or_heads query_blocks places"],
        key_blocks: int,
        row_block: int,
        key_block: int,
    ) -> "BlockLists":
        """Lists of numbers of key blocks in any order; -1 marks an unused place, a repeated number counts once.

        Raises ValueError for a number outside -1..key_blocks - 1.
        """
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < key_blocks:
            raise ValueError(f"ids must be -1..{key_blocks - 1}; found {int(ids.min())}..{int(ids.max())}")
        table = torch.zeros(*ids.shape[:3], key_blocks + 1, dtype=torch.bool, device=ids.device)
        table.scatter_(3, torch.where(ids < 0, key_blocks, ids).long(), True)
        return BlockLists.from_table(table[..., :key_blocks], row_block, key_block)

    def listed(self) -> Bool[Tensor, "one_or_batch one_or_heads query_blocks key_blocks"]:
        """For every place of ``index`` whether it is in use."""
        return torch.arange(self.index.shape[3], device=self.index.device) < self.count[..., None]

    def table(self) -> Bool[Tensor, "one_or_batch one_or_heads query_blocks key_blocks"]:
        """True where a key block is listed."""
        listed = self.listed()
        return torch.zeros_like(listed).scatter_(3, self.index.long(), listed)

    def mask(self, rows: int, keys: int) -> Bool[Tensor, "one_or_batch one_or_heads {rows} {keys}"]:
        """True where the block of a row lists the block of a key: rows x keys of memory."""
        table = self.table()
        row = torch.arange(rows, device=table.device) // self.row_block
        key = torch.arange(keys, device=table.device) // self.key_block
        return table[:, :, row[:, None], key]

    def transposed(self) -> "BlockLists":
        """For every key block the query blocks that list it: what a pass over keys walks."""
        return BlockLists.from_table(self.table().transpose(2, 3), self.key_block, self.row_block)

    def density(self) -> float:
        """Share of all pairs of blocks that is listed (waits for the GPU)."""
        return float(self.count.sum()) / max(1, self.index.numel())

    def tiles(self, rows: int, keys: int, tile: int) -> Tiles:
        """The lists seen through square tiles of another size, which need not divide the blocks or be divided."""
        table = self.table()
        sums = torch.nn.functional.pad(table.to(torch.int32), (1, 0, 1, 0)).cumsum(2).cumsum(3)
        top, bottom = _span(rows, tile, self.row_block, table.device)
        left, right = _span(keys, tile, self.key_block, table.device)
        box = lambda i, j: sums[:, :, i[:, None], j]  # noqa: E731
        inside = box(bottom, right) - box(top, right) - box(bottom, left) + box(top, left)
        return Tiles(inside > 0, inside == (bottom - top)[:, None] * (right - left))


def _span(length: int, tile: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every tile the first block that it touches and the one after the last."""
    start = torch.arange(0, length, tile, device=device)
    return start // block, ((start + tile).clamp_max(length) - 1) // block + 1


def check(
    op: str, lists: BlockLists, batch: int, heads: int, rows: int, keys: int, device: torch.device, look: bool
) -> None:
    """Refuse lists that do not fit rows x keys or, where ``look`` says so, lists that break their own rules.

    Raises ValueError naming the field, what was expected and what was found.
    """
    if lists.row_block < 1 or lists.key_block < 1:
        found = f"{lists.row_block} x {lists.key_block}"
        raise ValueError(f"{op}: blocks of lists must have 1 or more rows and keys; found {found}")
    query_blocks, key_blocks = -(-rows // lists.row_block), -(-keys // lists.key_block)
    for name, x, wanted in (
        ("count", lists.count, (query_blocks,)),
        ("index", lists.index, (query_blocks, key_blocks)),
    ):
        if x.ndim != len(wanted) + 2 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            expected = ("1 or batch", "1 or heads", *wanted)
            raise ValueError(f"{op}: lists.{name} must have shape {expected}; found {tuple(x.shape)}")
        if tuple(x.shape[2:]) != wanted:
            blocks = f"{lists.row_block} rows and {lists.key_block} keys"
            raise ValueError(
                f"{op}: lists.{name} must end in {wanted}, blocks of {blocks} over {rows} rows and {keys} keys; "
                f"found {tuple(x.shape)}"
            )
        if x.dtype != torch.int32 or x.device != device:
            raise ValueError(f"{op}: lists.{name} must be int32 on {device}; found {x.dtype} on {x.device}")
    if lists.count.shape[:2] != lists.index.shape[:2]:
        found = f"{tuple(lists.count.shape)}, {tuple(lists.index.shape)}"
        raise ValueError(f"{op}: lists.count and lists.index must share batch and heads; found {found}")
    if lists.each is not None and not 0 <= lists.each <= key_blocks:
        raise ValueError(f"{op}: lists.each must be 0..{key_blocks}; found {lists.each}")
    if look and lists.index.numel():
        _check_values(op, lists)


def _check_values(op: str, lists: BlockLists) -> None:
    last = lists.index.shape[3] - 1
    least, most = int(lists.count.min()), int(lists.count.max())
    if least < 0 or most > last + 1:
        raise ValueError(f"{op}: lists.count must be 0..{last + 1}; found {least}..{most}")
    if lists.each is not None and (least, most) != (lists.each, lists.each):
        raise ValueError(f"{op}: lists.count must be lists.each, {lists.each}; found {least}..{most}")
    listed = lists.listed()
    outside = listed & ((lists.index < 0) | (lists.index > last))
    if bool(outside.any()):
        raise ValueError(f"{op}: lists.index must be 0..{last}; found {int(lists.index[outside][0])}")
    falls = listed[..., 1:] & (lists.index.diff(dim=-1) <= 0)
    if bool(falls.any()):
        where = tuple(falls.nonzero()[0].tolist()[:3])
        found = lists.index[where][: int(lists.count[where])].tolist()
        raise ValueError(f"{op}: lists.index must rise within each list; found {found} at {where}")
