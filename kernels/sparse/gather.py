"""Block-sparse attention in PyTorch that computes the listed blocks only: time and memory follow the density.

Blocks of many rows gather the keys they list (:func:`_by_rows`). Where a block of rows is smaller than a block of keys
(every row choosing for itself, as in MoBA) that would copy a key once per row; there each key block gathers the rows
that list it, and what a row got from its blocks is merged by log-sum-exp (:func:`_by_keys`). Lists of about the same
length are worked off together, so that little is filled up; the backward computes each step again.

It saves memory at any density. On a CPU it saves time against PyTorch's fused dense attention where a tenth of the
pairs or fewer are listed (measured at 4096 tokens, head dim 64, one core).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from vlm.kernels.sparse.lists import BlockLists
from vlm.kernels.visibility import HIDDEN_KEY, HIDDEN_ROW, Operands

CHUNK = 1 << 21  # numbers that one step holds, about

Parts = tuple[Tensor, Tensor, Tensor]  # of a step: out, log-sum-exp, and which query blocks or rows they are of


class Codes(NamedTuple):
    """Positions and documents: who sees whom, as :meth:`~vlm.kernels.visibility.Visibility.codes` says it."""

    position: Int[Tensor, "*blocks elements"]
    document: Int[Tensor, "*blocks elements"]


class Blocks(NamedTuple):
    """Operands cut in blocks, numbered through all samples and heads (codes: through all samples).

    The last block of a sequence is filled up with rows that see nothing and keys that nobody sees.
    """

    q: Float[Tensor, "batch_heads_query_blocks row_block dim"]
    k: Float[Tensor, "batch_kv_heads_key_blocks key_block dim"]
    v: Float[Tensor, "batch_kv_heads_key_blocks key_block value_dim"]
    rows: Codes
    keys: Codes
    kv_heads: int
    kv_head_of: Int[Tensor, " heads"]
    query_blocks: int  # of one sequence
    key_blocks: int
    scale: float
    causal: bool
    accumulator: torch.dtype


class Step(NamedTuple):
    """Some blocks of one side, each with its list of blocks of the other side, filled up to the longest."""

    sample: Int[Tensor, " some"]
    head: Int[Tensor, " some"]
    block: Int[Tensor, " some"]
    others: Int[Tensor, "some places"]
    listed: Bool[Tensor, "some places"]


def block_sparse_torch(x: Operands, lists: BlockLists) -> tuple[Tensor, Tensor]:
    assert x.v is not None
    (batch, heads, rows), value_dim = x.q.shape[:3], x.v.shape[3]
    query_blocks, key_blocks = lists.index.shape[2:]
    row_position, key_position, row_document, key_document = x.seen.codes(batch)
    blocks = Blocks(
        _cut(x.q.flatten(0, 1), lists.row_block),
        _cut(x.k.flatten(0, 1), lists.key_block),
        _cut(x.v.flatten(0, 1), lists.key_block),
        Codes(_cut(row_position, lists.row_block), _cut(row_document, lists.row_block, HIDDEN_ROW)),
        Codes(_cut(key_position, lists.key_block), _cut(key_document, lists.key_block, HIDDEN_KEY)),
        x.k.shape[1],
        x.head_map().long(),
        query_blocks,
        key_blocks,
        x.scale,
        x.seen.causal,
        x.accumulator,
    )
    walk = _by_keys if lists.row_block < lists.key_block else _by_rows
    out, lse = walk(blocks, lists, batch)
    out, lse = out.view(batch, heads, -1, value_dim), lse.view(batch, heads, -1)
    return out[:, :, :rows].to(x.v.dtype), lse[:, :, :rows]


def _cut(x: Tensor, block: int, fill: int = 0) -> Tensor:
    """[sequences, length, ...] -> [sequences * blocks, block, ...]."""
    missing = -x.shape[1] % block
    return pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=fill).unflatten(1, (-1, block)).flatten(0, 1)


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Blocks by number, those of one problem side by side: x[at], but with a fast backward."""
    taken = x.index_select(0, at.flatten()).unflatten(0, at.shape)
    return taken.flatten(1, 2) if at.ndim == 2 else taken


def _steps(lists: BlockLists, batch: int, heads: int, held: int) -> Iterator[Step]:
    """All lists, the longest first; ``held`` is how many numbers each listed block makes a step hold."""
    blocks = lists.count.shape[2]
    count = lists.count.expand(batch, heads, -1).flatten()
    if lists.each is None:
        order = count.argsort(descending=True, stable=True)
        spans = _spans(count[order].tolist(), held)
    else:
        order = torch.arange(len(count), device=count.device)
        # A compiler gets one step, with which it is quicker than with many; it decides what is held.
        most = len(count) if torch.compiler.is_compiling() else max(1, CHUNK // max(1, lists.each * held))
        spans = [(start, start + most, lists.each) for start in range(0, len(count), most)]
    for start, end, longest in spans:
        some = order[start:end]
        sample, head, block = some // (heads * blocks), some // blocks % heads, some % blocks
        of = (sample * (lists.index.shape[0] > 1), head * (lists.index.shape[1] > 1), block)
        listed = torch.arange(longest, device=some.device) < count[some, None]
        yield Step(sample, head, block, lists.index[..., :longest][of].long(), listed)


def _spans(lengths: list[int], held: int) -> Iterator[tuple[int, int, int]]:
    """Lists that go into one step, of falling lengths: (the first, the one after the last, the longest length)."""
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        half = bisect_right(lengths, -longest / 2, key=lambda length: -length)  # no list is filled up to its double
        end = min(len(lengths), half, start + max(1, CHUNK // max(1, longest * held)))
        yield start, end, longest
        start = end


def _run(function: Callable[[Blocks, Step], Parts], x: Blocks, step: Step) -> Parts:
    """A step, computed again in the backward if there will be one (the first checkpoint imports for seconds)."""
    needed = torch.is_grad_enabled() and (x.q.requires_grad or x.k.requires_grad or x.v.requires_grad)
    if not needed or torch.compiler.is_compiling():  # a compiler weighs on its own what to compute again
        return function(x, step)
    return checkpoint(function, x, step, use_reentrant=False, preserve_rng_state=False)


def _by_rows(x: Blocks, lists: BlockLists, batch: int) -> tuple[Tensor, Tensor]:
    """Every query block gathers the key blocks it lists."""
    heads, (_, row_block, dim) = len(x.kv_head_of), x.q.shape
    held = x.k.shape[1] * (dim + x.v.shape[2] + row_block)
    if not len(x.q):
        return x.q.new_zeros(0, row_block, x.v.shape[2]), x.q.new_zeros(0, row_block, dtype=x.accumulator)
    parts = [_run(_some_rows, x, step) for step in _steps(lists, batch, heads, held)]
    out, lse, number = (torch.cat(each) for each in zip(*parts, strict=True))
    back = number.argsort()
    return out.index_select(0, back), lse.index_select(0, back)


def _some_rows(x: Blocks, step: Step) -> Parts:
    """(out, log-sum-exp, number) of some query blocks."""
    number = (step.sample * len(x.kv_head_of) + step.head) * x.query_blocks + step.block
    key = (step.sample * x.kv_heads + x.kv_head_of[step.head])[:, None] * x.key_blocks + step.others
    code = step.sample[:, None] * x.key_blocks + step.others
    rows = Codes(*(_take(each, step.sample * x.query_blocks + step.block) for each in x.rows))
    keys = _codes(x.keys, code, step.listed, HIDDEN_KEY)
    out, lse = _attend(x, _take(x.q, number), _take(x.k, key), _take(x.v, key), rows, keys)
    return out, lse, number


def _by_keys(x: Blocks, lists: BlockLists, batch: int) -> tuple[Tensor, Tensor]:
    """Every key block gathers the query blocks that list it; the parts of a row are merged."""
    heads, (query_blocks, row_block, dim) = len(x.kv_head_of), x.q.shape
    held = row_block * (dim + x.v.shape[2] + x.k.shape[1])
    steps = (step for step in _steps(lists.transposed(), batch, heads, held) if step.others.shape[1])
    parts = [_run(_some_keys, x, step) for step in steps]
    return _merged(x, parts, query_blocks * row_block)


def _some_keys(x: Blocks, step: Step) -> Parts:
    """(out, log-sum-exp, row) of the rows that list some key blocks: what those blocks give them."""
    key = (step.sample * x.kv_heads + x.kv_head_of[step.head]) * x.key_blocks + step.block
    number = (step.sample * len(x.kv_head_of) + step.head)[:, None] * x.query_blocks + step.others
    code = step.sample[:, None] * x.query_blocks + step.others
    rows = _codes(x.rows, code, step.listed, HIDDEN_ROW)
    keys = Codes(*(_take(each, step.sample * x.key_blocks + step.block) for each in x.keys))
    out, lse = _attend(x, _take(x.q, number), _take(x.k, key), _take(x.v, key), rows, keys)
    row = number[..., None] * x.q.shape[1] + torch.arange(x.q.shape[1], device=number.device)
    return out.flatten(0, 1), lse.flatten(), row.flatten()


def _codes(codes: Codes, at: Tensor, listed: Tensor, nobody: int) -> Codes:
    """Codes of gathered blocks; a place that is not in use holds nobody."""
    document = codes.document.index_select(0, at.flatten()).unflatten(0, at.shape)
    return Codes(_take(codes.position, at), document.masked_fill(~listed[..., None], nobody).flatten(1, 2))


def _attend(
    x: Blocks,
    q: Float[Tensor, "some rows dim"],
    k: Float[Tensor, "some keys dim"],
    v: Float[Tensor, "some keys value_dim"],
    rows: Codes,
    keys: Codes,
) -> tuple[Float[Tensor, "some rows value_dim"], Float[Tensor, "some rows"]]:
    """Attention of gathered rows to gathered keys: (out, natural log-sum-exp) in the accumulator's type."""
    hidden = rows.document[:, :, None] != keys.document[:, None, :]
    if x.causal:
        hidden |= keys.position[:, None, :] > rows.position[:, :, None]
    scores = (q.to(x.accumulator) * x.scale) @ k.to(x.accumulator).transpose(1, 2)
    scores.masked_fill_(hidden, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if k.shape[1] else scores.new_zeros(*q.shape[:2], 1)
    top = top.masked_fill(top.isinf(), 0)
    weights = scores.sub_(top).exp_()  # in place: fresh memory costs more than the arithmetic
    total = weights.sum(-1)
    empty = total == 0  # rows that see nothing
    total = total.masked_fill(empty, 1)
    lse = (top[..., 0] + total.log()).masked_fill(empty, float("-inf"))
    return weights @ v.to(x.accumulator) / total[..., None], lse


def _merged(x: Blocks, parts: list[Parts], rows: int) -> tuple[Tensor, Tensor]:
    """Parts (out, log-sum-exp, row) added up, each weighing as much as its log-sum-exp says."""
    sums = torch.zeros(rows, x.v.shape[2], dtype=x.accumulator, device=x.q.device)
    top = torch.full((rows,), float("-inf"), dtype=x.accumulator, device=x.q.device)
    if not parts:
        return sums, top
    out, lse, row = (torch.cat(each) for each in zip(*parts, strict=True))
    top = top.scatter_reduce(0, row, lse.detach(), "amax")
    top = top.masked_fill(top.isinf(), 0)
    weight = torch.exp(lse - top[row])
    total = torch.zeros_like(top).index_add(0, row, weight)
    sums = sums.index_add(0, row, weight[:, None] * out)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return sums / total[:, None], (top + total.log()).masked_fill(empty, float("-inf"))
