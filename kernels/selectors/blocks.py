"""What selectors share: means of blocks, the best of them, and which pairs of blocks can see each other."""

from dataclasses import dataclass
from math import gcd

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import Common, Operands, operands

FAR = 1 << 30  # beyond every position


@dataclass(frozen=True)
class Pairs:
    """Query blocks against key blocks. Blocks go by index; so does causality, with or without lengths or padding.

    start: position of the first row of each query block, among the keys.
    last: position of its last real row, -FAR where it has none.
    first_key: the first real key of each key block, FAR where it has none.
    """

    x: Operands
    row_block: int
    key_block: int
    start: Int[Tensor, "#batch query_blocks"]
    last: Int[Tensor, "#batch query_blocks"]
    first_key: Int[Tensor, "#batch key_blocks"]

    def key_numbers(self) -> Int[Tensor, " key_blocks"]:
        return torch.arange(self.first_key.shape[1], device=self.first_key.device)

    def possible(self) -> Bool[Tensor, "one_or_batch 1 query_blocks key_blocks"]:
        """Where at least one row may see at least one key."""
        first, last = self.first_key[:, None, None], self.last[:, None, :, None]
        real = (first < FAR) & (last > -FAR)
        return real & (first <= last) if self.x.seen.causal else real

    def own(self) -> Bool[Tensor, "one_or_batch 1 query_blocks key_blocks"]:
        """The diagonal: key blocks at the rows' own positions, up to the last real row."""
        number = self.key_numbers()
        start, last = (each[:, None, :, None] // self.key_block for each in (self.start, self.last))
        return (number >= start) & (number <= last)

    def first(self, blocks: int) -> Bool[Tensor, "one_or_batch 1 1 key_blocks"]:
        """The first key blocks that hold a real key."""
        real = self.first_key < FAR
        return (real & (real.cumsum(1) <= blocks))[:, None, None]

    def query_means(self) -> Float[Tensor, "batch heads query_blocks dim"]:
        return means(self.x.q.to(self.x.accumulator), self.row_block, self.x.seen.row_valid)

    def key_means(self) -> Float[Tensor, "batch heads key_blocks dim"]:
        """For every query head the means of the keys that it reads."""
        return self.x.per_head(means(self.x.k.to(self.x.accumulator), self.key_block, self.x.seen.key_valid))

    def lists(
        self, table: Bool[Tensor, "#batch #heads query_blocks key_blocks"], each: int | None = None
    ) -> BlockLists:
        """Lists of the table, less the pairs that cannot see each other; ``each``: so many are left in every list."""
        return BlockLists.from_table(table & self.possible(), self.row_block, self.key_block, each)


def pairs(op: str, q: Tensor, k: Tensor, row_block: int, key_block: int, common: Common) -> Pairs:
    """Check what a selector is called with.

    Raises ValueError for what attention refuses as well, for blocks without rows or keys, and for positions and packed
    documents: blocks go by index, and a block of two documents would let one choose for the other.
    """
    for name in ("q_pos", "q_doc"):
        if common.get(name) is not None:
            raise ValueError(f"{op}: selects by index, so {name} must be None; found a tensor")
    at_least(op, 1, **{"rows of a block": row_block, "keys of a block": key_block})
    x = operands(op, q, k, None, common)
    row = x.seen.positions()[0]  # [1 or B,Q]
    key = torch.arange(k.shape[2], device=k.device)[None]
    last = row if x.seen.row_valid is None else row.masked_fill(~x.seen.row_valid, -FAR)
    first = key if x.seen.key_valid is None else key.masked_fill(~x.seen.key_valid, FAR)
    last, first = cut(last, row_block, -FAR).amax(-1), cut(first, key_block, FAR).amin(-1)
    return Pairs(x, row_block, key_block, row[:, ::row_block], last, first)


def aligned(op: str, q: Tensor, k: Tensor, block: int, common: Common) -> Pairs:
    """Pairs whose query blocks each lie inside one block of positions, so that a pattern of whole blocks is exact.

    Blocks of ``block`` keys and as many rows, or of fewer rows where the rows do not start at a multiple of ``block``
    (decoding). With lengths it looks at them (waits for the GPU).
    """
    whole = pairs(op, q, k, block, block, common)
    starts = [k.shape[2] - q.shape[2]]
    if whole.x.seen.row_position is not None:
        starts = whole.x.seen.row_position[:, :1].flatten().tolist()
    fitting = gcd(block, *starts)
    return whole if fitting == block else pairs(op, q, k, fitting, block, common)


def at_least(op: str, least: int, **named: int) -> None:
    for name, value in named.items():
        if value < least:
            raise ValueError(f"{op}: {name} must be {least} or more; found {value}")


def needs_causal(op: str, common: Common) -> None:
    if not common.get("causal", True):
        raise ValueError(f"{op}: causal must be True; found False")


def cut(x: Int[Tensor, "one_or_batch length"], block: int, fill: int) -> Int[Tensor, "one_or_batch blocks {block}"]:
    """A sequence in blocks, the last one filled up."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=fill).unflatten(1, (-1, block))


def means(
    x: Float[Tensor, "batch any_heads length dim"], block: int, valid: Bool[Tensor, "batch length"] | None
) -> Float[Tensor, "batch any_heads blocks dim"]:
    """The mean of the real vectors of each block; 0 where there is none."""
    if valid is None:
        valid = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    real = valid[:, None, :, None]
    summed = [
        torch.nn.functional.pad(each, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block)).sum(3)
        for each in (x.masked_fill(~real, 0), real.to(x.dtype))
    ]
    return summed[0] / summed[1].clamp_min(1)


def best(
    scores: Float[Tensor, "batch one_or_heads query_blocks key_blocks"],
    budget: int,
    forced: Bool[Tensor, "#batch #one_or_heads #query_blocks key_blocks"],
    possible: Bool[Tensor, "#batch #one_or_heads query_blocks key_blocks"],
) -> Bool[Tensor, "batch one_or_heads query_blocks key_blocks"]:
    """The ``budget`` best possible blocks of each row of scores, counting the forced ones, which are all kept.

    Of equal scores the lower number wins, so a larger budget keeps what a smaller one kept.
    """
    forced = forced & possible
    scores = scores.masked_fill(forced, float("inf")).masked_fill(~possible, float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :budget], True)
    return (chosen | forced) & possible
