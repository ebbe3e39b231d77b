"""Key/value caches under a program: which entries stay after the prompt, go at a step, or are read at a step.

Policies mark entries; here the marks become shorter caches and masks. Heads may keep different entries, so what a
layer's cache holds is a table of places per key/value head. Entries keep the rotary positions that they were made with,
and the next token's position is the true length of its sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from vlm.models.program.budget import Budget
from vlm.models.program.layout import Layout, compact
from vlm.models.program.signals import Signal

Needs = Callable[[int], tuple[Signal, ...]]


class Held(NamedTuple):
    """What one layer's cache holds. place: where each entry stands in the layer's sequence; valid: it is no padding."""

    place: Int[Tensor, "batch kv_heads entries"]
    valid: Bool[Tensor, "batch kv_heads entries"]

    def append(self, count: int, place: int) -> "Held":
        """``count`` generated tokens follow, from ``place`` on in the sequence."""
        shape = (*self.place.shape[:2], count)
        new = torch.arange(place, place + count, device=self.place.device).expand(shape)
        return Held(torch.cat([self.place, new], 2), torch.cat([self.valid, new >= 0], 2))

    def mask(self, heads: int) -> Bool[Tensor, "batch heads 1 entries"] | None:
        """Which entries the query heads of a new token see; None when all are real."""
        if bool(self.valid.all()):
            return None
        return self.valid.repeat_interleave(heads // self.valid.shape[1], 1)[:, :, None]


class Entries(NamedTuple):
    """One layer's cache as a policy sees it.

    layout: of the layer's sequence, generated tokens included. held: what the cache holds of it. signal: values over
    the layer's sequence, read on the prompt. step: tokens generated so far. seed: gives an integer of each sample's
    pixels. memory: what a policy wants to remember between steps of this layer (``shared``: of all layers).
    """

    layer: int
    layout: Layout
    held: Held
    signal: Callable[[Signal], Tensor]
    step: int
    seed: Callable[[], Int[Tensor, " batch"]]
    memory: dict[str, Any]
    shared: dict[str, Any]

    @property
    def kv_heads(self) -> int:
        return self.held.place.shape[1]

    @property
    def prompt(self) -> Int[Tensor, " batch"]:
        """Entries that the layer's own prompt had: after a cut, those that the cut left."""
        return self.layout.valid.sum(1) - self.step

    @property
    def valid(self) -> Bool[Tensor, "batch entries"]:
        """Which entries are real, for a cache whose heads hold equally many."""
        return self.held.valid[:, 0]

    @property
    def visual(self) -> Bool[Tensor, "batch kv_heads entries"]:
        """Which entries are visual tokens."""
        wide = self.layout.visual[:, None].expand(-1, self.kv_heads, -1)
        return wide.gather(2, self.held.place) & self.held.valid


class Row(NamedTuple):
    """What the row of a generated token did in one layer.

    query, key: after the rotation; key holds the entries that were read, real: which of those are no padding. place:
    where they stand in the cache, None when all ``entries`` of it were read.
    """

    query: Float[Tensor, "batch heads dim"]
    key: Float[Tensor, "batch kv_heads read dim"]
    real: Bool[Tensor, "batch kv_heads read"]
    place: Int[Tensor, "batch kv_heads read"] | None
    entries: int
    scale: float | None

    def attention(self) -> Float[Tensor, "batch heads entries"]:
        """What the row paid to each entry of the cache, 0 to those that it did not read; single precision or more."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        q = self.query.unflatten(1, (kv_heads, -1)).to(wide)  # [B,KV,G,D]
        scale = self.query.shape[2] ** -0.5 if self.scale is None else self.scale
        score = (q @ self.key.transpose(2, 3).to(wide) * scale).masked_fill(~self.real[:, :, None], -torch.inf)
        paid = score.softmax(-1).flatten(1, 2)  # [B,H,R]
        if self.place is None:
            return paid
        everywhere = paid.new_zeros(*paid.shape[:2], self.entries)
        return everywhere.scatter(2, self.place.repeat_interleave(heads // kv_heads, 1), paid)


@dataclass(frozen=True)
class Evict:
    """Op at ``kv.prefill``: after the prompt, the entries that stay, for all layers at once (so that layers can share a
    budget). ``needs(layer)`` are the signals of a layer."""

    needs: Needs
    keep: Callable[[Sequence[Entries]], Sequence[Bool[Tensor, "batch kv_heads entries"]]]


def _nothing(layer: int) -> tuple[Signal, ...]:
    return ()


def _ignore(entries: Entries, row: Row) -> None:
    return None


@dataclass(frozen=True)
class EvictStep:
    """Op at ``kv.decode``: after each generated token, the entries of a layer that stay; None: all.

    seen(entries, row) is called with the attention of each generated token's row, before ``keep``.
    """

    keep: Callable[[Entries], Bool[Tensor, "batch kv_heads entries"] | None]
    seen: Callable[[Entries, Row], None] = _ignore


@dataclass(frozen=True)
class ReadStep:
    """Op at ``kv.decode``: the entries that a generated token's row reads in a layer; nothing is evicted.

    start(entries) is called after the prompt, the only time at which signals (``needs``) can be asked for.
    read(entries, query) marks the entries before the layer's attention (None: all). seen(entries, row) is called with
    the attention that followed.
    """

    read: Callable[[Entries, Float[Tensor, "batch heads dim"]], Bool[Tensor, "batch kv_heads entries"] | None]
    seen: Callable[[Entries, Row], None] = _ignore
    start: Callable[[Entries], None] = lambda entries: None
    needs: Needs = _nothing


def held_whole(layout: Layout, kv_heads: int) -> Held:
    """A cache that holds its whole sequence."""
    batch, length = layout.role.shape
    index = torch.arange(length, device=layout.role.device).expand(batch, kv_heads, length)
    return Held(index, layout.valid[:, None].expand(-1, kv_heads, -1))


def pick(
    marks: Bool[Tensor, "batch kv_heads entries"],
) -> tuple[Int[Tensor, "batch kv_heads kept"], Bool[Tensor, "batch kv_heads kept"]]:
    """Places of the marked entries of each head in order, padded on the left, and which are real."""
    index, real = compact(marks.flatten(0, 1), "left")
    return index.unflatten(0, marks.shape[:2]), real.unflatten(0, marks.shape[:2])


def gather_entries(
    states: Float[Tensor, "batch kv_heads entries dim"], index: Int[Tensor, "batch kv_heads kept"]
) -> Float[Tensor, "batch kv_heads kept dim"]:
    """Keys or values at ``index``."""
    return states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[3]))


class PackedLayer(CacheLayerMixin):
    """A layer's cache whose rows or heads hold different numbers of entries, stored without padding.

    keys, values: [all entries of all heads and rows, dim]; the padded form is made for the time of the layer's
    attention only, so uneven heads free what their marks drop.
    """

    is_croppable = True

    def __init__(
        self,
        keys: Float[Tensor, "batch kv_heads entries dim"],
        values: Float[Tensor, "batch kv_heads entries dim"],
        real: Bool[Tensor, "batch kv_heads entries"],
    ) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._pack(keys, values, real)

    def _pack(self, keys: Tensor, values: Tensor, real: Tensor) -> None:
        self.keys: Any = keys[real]
        self.values: Any = values[real]
        self.real = real

    def padded(self) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv_heads, entries, dim], 0 where there is no entry."""
        mask = self.real[..., None]
        keys, values = (
            states.new_zeros(*self.real.shape, states.shape[1]).masked_scatter(mask, states)
            for states in (self.keys, self.values)
        )
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = zip(self.padded(), (key_states, value_states), strict=True)
        keys, values = (torch.cat(pair, 2) for pair in new)
        self._pack(keys, values, torch.nn.functional.pad(self.real, (0, key_states.shape[2]), value=True))
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError  # it is made with its entries

    def get_seq_length(self) -> int:
        return self.real.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._pack(*(states[beam_idx] for states in (*self.padded(), self.real)))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop so many entries, given as a negative number, from the end of every row and head."""
        self._pack(*(states[:, :, :tokens_to_remove] for states in (*self.padded(), self.real)))


def stored(layer: Any) -> tuple[Tensor, Tensor]:
    """A cache layer's keys and values [batch, kv_heads, entries, dim]."""
    return layer.padded() if isinstance(layer, PackedLayer) else (layer.keys, layer.values)


def shorten(cache: DynamicCache, layer: int, held: Held, keep: Bool[Tensor, "batch kv_heads entries"]) -> Held:
    """Drop the entries that are not marked from a layer's cache; returns what it then holds."""
    keep = keep & held.valid
    if bool((keep | ~held.valid).all()):
        return held
    index, real = pick(keep)
    keys, values = (gather_entries(states, index) for states in stored(cache.layers[layer]))
    if bool(real.all()):
        plain: Any = DynamicLayer()
        plain.update(keys, values)
        cache.layers[layer] = plain
    else:
        cache.layers[layer] = PackedLayer(keys, values, real)
    return Held(held.place.gather(2, index), real)


def stay(
    value: Float[Tensor, "batch kv_heads entries"], entries: Entries, keep: Bool[Tensor, "batch kv_heads entries"]
) -> Float[Tensor, "batch kv_heads kept"]:
    """What a policy remembers of each entry, after :func:`shorten` has dropped the others."""
    return value.gather(2, pick(keep & entries.held.valid)[0])


def capacity(keep: Budget, entries: Entries) -> Int[Tensor, " batch"]:
    """Entries that each head of the layer may keep of each sample's prompt: a share of it, or a number."""
    return keep.count(entries.prompt, torch.ones_like(entries.prompt))


def standing(keep: Budget, entries: Entries) -> Int[Tensor, " batch"]:
    """Entries that each head of the layer may hold at any time: a share of the prompt, or a number, which a shorter
    prompt leaves room to grow to."""
    share = capacity(keep, entries)
    return share if keep.tokens is None else torch.full_like(share, keep.tokens)
