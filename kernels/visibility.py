"""Who sees whom: the one place that turns causality, padding, positions and packing into a mask.

Every attention operation takes the keywords of :class:`Common` and hands them, checked, to its implementations as
:class:`Operands`. An implementation asks :class:`Visibility` for the form it needs: a mask, a function of indices
for FlexAttention, or four integer vectors for a Triton kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HIDDEN_KEY, HIDDEN_ROW = -1, -2  # documents of a key that nobody sees and of a row that sees nothing


class Common(TypedDict, total=False):
    """Keywords that every attention operation takes. Row i sees key j iff all of these say so.

    causal: key j stands not after row i. True unless said otherwise. Without positions the two sequences end
        together (aligned bottom right): ``j <= i + keys - rows``, or ``j <= i + k_len - q_len`` with lengths.
    q_len, k_len: [batch], rows and keys that are real, counted from the left (right padding).
    key_valid: [batch, keys] bool, False hides a key (padding on either side, holes).
    q_pos, k_pos: [batch, rows], [batch, keys], given together; causality goes by them instead of by index (tokens
        that were permuted or gathered).
    q_doc, k_doc: [batch, rows], [batch, keys], 0 or more, given together; a row sees only keys of its own document
        (packed samples).
    kv_head_of: [heads], the key/value head that each query head reads; ``h // (heads / kv_heads)`` if not given.
    scale: of the scores; ``dim ** -0.5`` if not given.
    validate: look at the values of arguments, not at their shapes and types only (waits for the GPU); True unless said
        otherwise. Values out of range are undefined behaviour without it.

    A row that sees no key gives output 0, log-sum-exp -inf, masses 0, and no gradient.
    """

    causal: bool
    q_len: Tensor | None
    k_len: Tensor | None
    key_valid: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None
    q_doc: Tensor | None
    k_doc: Tensor | None
    kv_head_of: Tensor | None
    scale: float | None
    validate: bool


@dataclass(frozen=True)
class Visibility:
    """Which key each row may see. Every field but the first four may be None: then it hides nothing.

    ``row_position``/``key_position`` are None when causality goes by index, aligned bottom right.
    """

    rows: int
    keys: int
    causal: bool
    device: torch.device
    row_valid: Bool[Tensor, "batch rows"] | None = None
    key_valid: Bool[Tensor, "batch keys"] | None = None
    row_position: Int[Tensor, "batch rows"] | None = None
    key_position: Int[Tensor, "batch keys"] | None = None
    row_document: Int[Tensor, "batch rows"] | None = None
    key_document: Int[Tensor, "batch keys"] | None = None

    @property
    def by_index(self) -> bool:
        """Whether causality by index (or none) is all there is: no padding, positions or documents."""
        extra = (self.row_valid, self.key_valid, self.row_position, self.row_document)
        return all(x is None for x in extra)

    def positions(self) -> tuple[Int[Tensor, "one_or_batch rows"], Int[Tensor, "one_or_batch keys"]]:
        """Positions of rows and keys, by index (aligned bottom right) where none were given."""
        if self.row_position is not None and self.key_position is not None:
            return self.row_position, self.key_position
        row = torch.arange(self.keys - self.rows, self.keys, device=self.device)
        return row[None], torch.arange(self.keys, device=self.device)[None]

    def mask(self, rows: slice = slice(None)) -> Bool[Tensor, "batch_or_1 1 rows_or_fewer keys"]:
        """True where a row sees a key; ``rows`` asks for some rows only."""
        row_position, key_position = self.positions()
        row_position = row_position[:, rows]
        seen = torch.ones(1, row_position.shape[1], self.keys, dtype=torch.bool, device=self.device)
        if self.causal:
            seen = key_position[:, None, :] <= row_position[:, :, None]
        if self.row_document is not None and self.key_document is not None:
            seen = seen & (self.row_document[:, rows, None] == self.key_document[:, None, :])
        if self.row_valid is not None:
            seen = seen & self.row_valid[:, rows, None]
        if self.key_valid is not None:
            seen = seen & self.key_valid[:, None, :]
        return seen[:, None]

    def pick(self, rows: Int[Tensor, "batch chosen"]) -> "Visibility":
        """The same for chosen rows; a row of -1 sees nothing. Rows keep the positions they had."""
        at = rows.clamp_min(0)
        row_position, key_position = self.positions()
        take = lambda x: None if x is None else x.expand(len(rows), -1).gather(1, at)  # noqa: E731
        valid = rows >= 0
        if self.row_valid is not None:
            valid = valid & self.row_valid.gather(1, at)
        key_position = key_position.expand(len(rows), -1)
        picked = (take(row_position), key_position, take(self.row_document), self.key_document)
        return Visibility(rows.shape[1], self.keys, self.causal, self.device, valid, self.key_valid, *picked)

    def count(self, *, causal: bool | None = None) -> Int[Tensor, "one_or_batch rows"]:
        """How many keys each row sees, found without a rows x keys mask; ``causal=False`` counts later keys as well."""
        causal = self.causal if causal is None else causal
        fields = (self.row_valid, self.key_valid, self.row_position, self.row_document)
        batch = next((len(x) for x in fields if x is not None), 1)
        if self.keys == 0:
            return torch.zeros(batch, self.rows, dtype=torch.long, device=self.device)
        row_position, key_position, row_document, key_document = (x.long() for x in self.codes(batch))
        # one number per key that orders by document, then position; the keys a row sees are a stretch of them
        first, last = key_position.amin(), key_position.amax()
        stretch = last - first + 1
        ordered = (key_document * stretch + key_position - first).sort(-1).values  # [B,K]
        end = (row_position.clamp(first - 1, last) if causal else last.expand_as(row_position)) - first  # [B,Q]
        seen = torch.searchsorted(ordered, row_document * stretch + end, right=True)
        return seen - torch.searchsorted(ordered, row_document * stretch)

    def codes(
        self, batch: int
    ) -> tuple[
        Int[Tensor, "batch rows"], Int[Tensor, "batch keys"], Int[Tensor, "batch rows"], Int[Tensor, "batch keys"]
    ]:
        """For a Triton kernel: contiguous int32 (row position, key position, row document, key document).

        Row i sees key j iff the documents are equal and, when causal, key position <= row position. Hidden rows
        and keys have documents that equal no other.
        """
        row_position, key_position = (x.expand(batch, -1) for x in self.positions())
        row_document = self.row_document if self.row_document is not None else torch.zeros_like(row_position)
        key_document = self.key_document if self.key_document is not None else torch.zeros_like(key_position)
        if self.row_valid is not None:
            row_document = row_document.masked_fill(~self.row_valid, HIDDEN_ROW)
        if self.key_valid is not None:
            key_document = key_document.masked_fill(~self.key_valid, HIDDEN_KEY)
        every = (row_position, key_position, row_document, key_document)
        first, second, third, fourth = (x.to(torch.int32).contiguous() for x in every)
        return first, second, third, fourth

    def mask_mod(self, batch: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """For FlexAttention: the same mask as a function of (batch, head, row, key) indices."""
        row_position, key_position, row_document, key_document = self.codes(batch)
        if not self.causal:
            return lambda b, h, i, j: row_document[b, i] == key_document[b, j]
        return lambda b, h, i, j: (
            (row_document[b, i] == key_document[b, j]) & (key_position[b, j] <= row_position[b, i])
        )


@dataclass(frozen=True)
class Operands:
    """What an attention operation works on, checked by :func:`operands`. ``v`` is None where there is no value."""

    q: Float[Tensor, "batch heads rows dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    v: Float[Tensor, "batch kv_heads keys value_dim"] | None
    scale: float
    seen: Visibility
    kv_head_of: Int[Tensor, " heads"] | None = None  # None: h // (heads / kv_heads)

    @property
    def accumulator(self) -> torch.dtype:
        """The type of scores, sums, masses and log-sum-exps: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def head_map(self) -> Int[Tensor, " heads"]:
        """The key/value head of every query head, int32."""
        if self.kv_head_of is not None:
            return self.kv_head_of.to(torch.int32).contiguous()
        heads, kv_heads = self.q.shape[1], self.k.shape[1]
        return torch.arange(heads, dtype=torch.int32, device=self.q.device) // (heads // kv_heads)

    def per_head(self, x: Float[Tensor, "batch kv_heads keys any"]) -> Float[Tensor, "batch heads keys any"]:
        """Keys or values repeated so that every query head has its own."""
        if self.kv_head_of is None and x.shape[1] == self.q.shape[1]:
            return x
        return x[:, self.head_map().long()]

    def scores(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows_or_fewer keys"]:
        """Scaled scores with -inf where a key is hidden: rows x keys of memory, for references and small inputs.

        Low precision is multiplied in fp32, as a fused kernel does: scores rounded to bf16 would be worth two digits.
        """
        q, k = self.q[:, :, rows].to(self.accumulator), self.per_head(self.k).to(self.accumulator)
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.seen.rows == 1 and self.seen.by_index:
            return scores  # the last row sees every key
        return scores.masked_fill(~self.seen.mask(rows), float("-inf"))


def operands(op: str, q: Tensor, k: Tensor, v: Tensor | None, common: Common) -> Operands:
    """Check shapes, types and devices and gather what every operation needs.

    Raises ValueError that names the operation, the argument, what was expected and what was found.
    """
    check_tensors(op, q, k, v)
    unknown = set(common) - set(Common.__annotations__)
    if unknown:
        known = ", ".join(Common.__annotations__)
        raise TypeError(f"{op}: unknown keyword {sorted(unknown)[0]!r}; the common keywords are {known}")
    heads, kv_heads = q.shape[1], k.shape[1]
    kv_head_of = common.get("kv_head_of")
    if kv_head_of is not None:
        check(op, "kv_head_of", kv_head_of, (heads,), q.device, 0, kv_heads - 1, look=common.get("validate", True))
    elif kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: query heads must be a multiple of key heads (or give kv_head_of); found {heads}, {kv_heads}"
        )
    scale = common.get("scale")
    if scale is not None and not abs(float(scale)) < float("inf"):
        raise ValueError(f"{op}: scale must be finite; found {scale}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    seen = visibility(op, q.shape[0], q.shape[2], k.shape[2], q.device, common)
    return Operands(q, k, v, scale, seen, kv_head_of)


def visibility(op: str, batch: int, rows: int, keys: int, device: torch.device, common: Common) -> Visibility:
    """The visibility that the common keywords describe. Raises ValueError as :func:`operands` does."""
    row, key, look = (batch, rows), (batch, keys), common.get("validate", True)
    causal, key_valid = bool(common.get("causal", True)), common.get("key_valid")
    if key_valid is not None:
        check(op, "key_valid", key_valid, key, device)
        if key_valid.dtype != torch.bool:
            raise ValueError(f"{op}: key_valid must be bool; found {key_valid.dtype}")
    q_pos, k_pos = _pair(op, ("q_pos", "k_pos"), row, key, device, common, look=False)
    q_doc, k_doc = _pair(op, ("q_doc", "k_doc"), row, key, device, common, look=look)
    q_len, k_len = common.get("q_len"), common.get("k_len")
    row_valid = None
    if q_len is not None:
        check(op, "q_len", q_len, (batch,), device, 0, rows, look=look)
        row_valid = torch.arange(rows, device=device) < q_len[:, None]
    if k_len is not None:
        check(op, "k_len", k_len, (batch,), device, 0, keys, look=look)
        real = torch.arange(keys, device=device) < k_len[:, None]
        key_valid = real if key_valid is None else key_valid & real
    if q_pos is None and causal and (q_len is not None or k_len is not None):
        end = torch.full((batch,), keys, device=device) if k_len is None else k_len
        start = end - (torch.full((batch,), rows, device=device) if q_len is None else q_len)
        q_pos = torch.arange(rows, device=device) + start[:, None]
        k_pos = torch.arange(keys, device=device).expand(batch, -1)
    return Visibility(rows, keys, causal, device, row_valid, key_valid, q_pos, k_pos, q_doc, k_doc)


def check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Refuse q, k, v whose ranks, shapes, types or devices do not fit."""
    named = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in named.items():
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, length, dim]; found shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must be floating and of the type of q, {q.dtype}; found {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} must be on the device of q, {q.device}; found {x.device}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q and k must share batch and dim; found {tuple(q.shape)}, {tuple(k.shape)}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: v must share batch, heads and keys with k, {tuple(k.shape)}; found {tuple(v.shape)}")


def check(
    op: str,
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    low: int | None = None,
    high: int | None = None,
    *,
    look: bool = True,
) -> None:
    """Refuse an argument of another shape or device or, where bounds are given, not integer or outside them.

    Looking at values waits for the device; without ``look`` only the shape, the device and the type are checked.
    """
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}; found {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}; found {x.device}")
    if low is None and high is None:
        return
    if x.dtype.is_floating_point or x.dtype == torch.bool:
        raise ValueError(f"{op}: {name} must be integer; found {x.dtype}")
    if not look or not x.numel():
        return
    least, most = int(x.min()), int(x.max())
    if (low is not None and least < low) or (high is not None and most > high):
        wanted = f"{low}..{high}" if high is not None else f"{low} or more"
        raise ValueError(f"{op}: {name} must be {wanted}; found {least}..{most}")


def _pair(
    op: str,
    names: tuple[str, str],
    row: tuple[int, int],
    key: tuple[int, int],
    device: torch.device,
    common: Common,
    look: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Two arguments that come together: integers, 0 or more if they are looked at."""
    first, second = common.get(names[0]), common.get(names[1])
    if (first is None) != (second is None):
        given, missing = names if second is None else names[::-1]
        raise ValueError(f"{op}: {given} was given without {missing}; both or neither")
    if first is not None and second is not None:
        check(op, names[0], first, row, device, 0, look=look)
        check(op, names[1], second, key, device, 0, look=look)
    return first, second
