"""Key/value caches under a program: which entries stay after the prompt, go at a step, or are read at a step.

Policies mark entries; here the marks become shorter caches and masks. Heads may keep different entries, so what a
layer's cache holds is a table of places per key/value head. Entries keep the rotary positions that they were made with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.layout import Layout, compact
from vlm.models.program.signals import Attention, Signal

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
    the layer's sequence as it was when they were read. step: tokens generated so far. memory: what a policy wants to
    remember between steps of this layer (``shared``: of all layers).
    """

    layer: int
    layout: Layout
    held: Held
    signal: Callable[[Signal], Tensor]
    step: int
    memory: dict[str, Any]
    shared: dict[str, Any]

    @property
    def kv_heads(self) -> int:
        return self.held.place.shape[1]

    @property
    def visual(self) -> Bool[Tensor, "batch kv_heads entries"]:
        """Which entries are visual tokens."""
        wide = self.layout.visual[:, None].expand(-1, self.kv_heads, -1)
        return wide.gather(2, self.held.place) & self.held.valid


@dataclass(frozen=True)
class Evict:
    """Op at ``kv.prefill``: after the prompt, the entries that stay, for all layers at once (so that layers can share a
    budget). ``needs(layer)`` are the signals of a layer."""

    needs: Needs
    keep: Callable[[Sequence[Entries]], Sequence[Bool[Tensor, "batch kv_heads entries"]]]


@dataclass(frozen=True)
class EvictStep:
    """Op at ``kv.decode``: after each generated token, the entries of a layer that stay; None: all."""

    needs: Needs
    keep: Callable[[Entries], Bool[Tensor, "batch kv_heads entries"] | None]


@dataclass(frozen=True)
class ReadStep:
    """Op at ``kv.decode``: the entries that a generated token's row reads in a layer; nothing is evicted.

    read(entries) marks them before the layer's attention (None: all). seen(entries, attention) is called with the
    attention call that followed, whose keys are the entries read, at ``places`` of the cache.
    """

    needs: Needs
    read: Callable[[Entries], Bool[Tensor, "batch kv_heads entries"] | None]
    seen: Callable[[Entries, Attention, Int[Tensor, "batch kv_heads read"] | None], None]


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


def shorten(cache_layer: Any, held: Held, keep: Bool[Tensor, "batch kv_heads entries"]) -> Held:
    """Drop the entries that are not marked from a layer's cache; returns what it then holds."""
    keep = keep & held.valid
    if bool((keep | ~held.valid).all()):
        return held
    index, real = pick(keep)
    cache_layer.keys = gather_entries(cache_layer.keys, index)
    cache_layer.values = gather_entries(cache_layer.values, index)
    return Held(held.place.gather(2, index), real)


def capacity(keep: Budget, entries: Entries) -> Int[Tensor, " batch"]:
    """Entries that each head of the layer may keep in each sample: of what the prompt's own layer holds."""
    prompt = entries.layout.valid.sum(1)
    return keep.count(prompt, torch.ones_like(prompt))
