"""What one stream knows about the sequence that runs through the decoder."""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.cache import Held
from vlm.models.program.layout import Layout, Side
from vlm.models.program.segments import rows_at
from vlm.models.program.signals import Signal


class Kept(NamedTuple):
    """What a cut made of the sequence: the places that stay, and where merged tokens take their features from.

    place: where each token of the new sequence comes from. merge(hidden) gives features for the tokens marked by
    ``merged``; both are None for a cut that only drops.
    """

    place: Int[Tensor, "batch kept"]
    merge: Callable[[Tensor], Float[Tensor, "batch kept width"]] | None = None
    merged: Bool[Tensor, "batch kept"] | None = None

    def apply(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch kept width"]:
        out = rows_at(hidden, self.place)
        if self.merge is None or self.merged is None:
            return out
        return torch.where(self.merged[..., None], self.merge(hidden).to(out.dtype), out)


class Run:
    """The layouts and signals of one stream: made for a prompt, extended with every generated token.

    layouts: first layer -> layout of the sequence from that layer on; a cut adds one. kept: layer -> what its cut kept,
    None if all. prompt: whether the pass under way is the prompt's; step: tokens generated so far. seed: gives an
    integer of each image's pixels. asks: places in the uncut sequence whose rows ask for what follows (see
    :class:`~vlm.models.program.signals.Received`), None for a prompt. total: visual tokens of each sample before any
    cut. deep: features [batch, length, width] that a model adds after its first decoder layers, one tensor each, at
    the places of the sequence as the data layer made it (``Layout.source``). held: layer -> what its cache holds, for
    layers whose cache was shortened. memory: what cache policies remember, by layer (-1: of all layers); tensors in it
    have the batch first. stream: the name of the context. inner: by the number of layers behind it, the last place's
    state in the pass that was last. grids: rows and columns of each image's tokens before any cut, where all images are
    such grids. packed: whether the sequences are packs of samples; lengths: of each, where that is all that attention
    needs to know (see :mod:`vlm.models.pack`). memo: what stays as it is while an answer
    grows, of any rows of it; tensors in it have the batch first. watchers: who adds up signals that all layers have a
    say in. rotary: position embeddings of the pass, by the first layer of the stage and what else they depend on.
    """

    def __init__(self, layout: Layout, side: Side, seed: Callable[[], Int[Tensor, " images"]]) -> None:
        self.layouts: dict[int, Layout] = {0: layout}
        self.side: Side = side
        self.seed = seed
        self.kept: dict[int, Kept | None] = {}
        self.prompt = True
        self.packed = False
        self.lengths: list[list[int]] | None = None
        self.step = 0
        self.asks: Int[Tensor, "batch asks"] | None = None
        self.total: Int[Tensor, " batch"] = layout.visual.sum(1)
        self.deep: list[Float[Tensor, "batch length width"]] = []
        self.held: dict[int, Held] = {}
        self.memory: dict[int, dict[str, Any]] = {}
        self.stream = "main"
        self.inner: dict[int, Float[Tensor, "batch width"]] = {}
        self.grids: list[tuple[int, int]] = []
        self.first: Float[Tensor, "batch vocab"] | None = None  # logits that the prompt gave, for other contexts
        self.memo: dict[Any, Any] = {}
        self.watchers: dict[Signal, Any] = {}
        self.rotary: dict[Any, Any] = {}
        self._signals: dict[int, dict[Signal, Tensor]] = {0: {}}
        self._asks: dict[int, Int[Tensor, "batch asks"]] = {}
        self._masks: dict[int, Bool[Tensor, "batch 1 rows keys"] | None] = {}

    def stage(self, layer: int) -> int:
        """The first layer of the stage that ``layer`` belongs to."""
        return max(first for first in self.layouts if first <= layer)

    def add_stage(self, layer: int, layout: Layout, index: Int[Tensor, "batch kept"]) -> None:
        """From ``layer`` on the sequence is ``layout``, gathered by ``index``; signals read so far come along."""
        before = max((first for first in self.layouts if first < layer), default=0)
        self._signals[layer] = {s: s.take(value, index) for s, value in self._signals[before].items()}
        self.layouts[layer] = layout
        self._masks.pop(layer, None)
        self.rotary.clear()
        self._asks.pop(layer, None)

    def put(self, signal: Signal, value: Tensor) -> None:
        """Enter what was read in the signal's layer, before a cut there or after it."""
        stage = self.stage(signal.layer)
        if self.prompt and signal.axis and value.shape[signal.key_axis] != self.layouts[stage].role.shape[1]:
            stage = self.stage(signal.layer - 1)  # read ahead of a cut that a first pass has made already
        self._signals[stage][signal] = value

    def get(self, signal: Signal, layer: int) -> Tensor:
        """A signal over the sequence that ``layer`` works on."""
        return self.signals(layer)[signal]

    def signals(self, layer: int) -> dict[Signal, Tensor]:
        """What has been read so far over the sequence that ``layer`` works on. A cut there starts a new table."""
        return self._signals[self.stage(layer)]

    def forget_signals(self) -> None:
        """Drop what was read, with the tensors it holds."""
        self._signals = {first: {} for first in self.layouts}

    def asking(self, layer: int) -> Int[Tensor, "batch asks"] | None:
        """The asking rows' places in the sequence of ``layer``, -1 where unused; a sample without any asks by its last
        token. None when all do."""
        if self.asks is None or not self.prompt:
            return None
        first = self.stage(layer)
        if first not in self._asks:
            layout = self.layouts[first]
            hit = (layout.source[:, None] == self.asks[..., None]) & layout.valid[:, None]  # [B,A,K]
            place = torch.arange(1, hit.shape[2] + 1, device=hit.device)
            found = (hit & (self.asks >= 0)[..., None]).mul(place).amax(2) - 1  # -1 where nothing was hit
            nothing = (found < 0).all(1, keepdim=True)
            self._asks[first] = torch.cat([found, torch.where(nothing, layout.last(layout.valid)[:, None], -1)], 1)
        return self._asks[first]

    @property
    def last(self) -> Layout:
        """The layout of what leaves the decoder."""
        return self.layouts[max(self.layouts)]

    def append(self, count: int = 1) -> None:
        """``count`` generated tokens follow in every stage; signals of the prompt do not grow."""
        grown = {layer: self.layouts[self.stage(layer)].role.shape[1] for layer in self.held}
        self.held = {layer: held.append(count, grown[layer]) for layer, held in self.held.items()}
        self.layouts = {first: layout.append(count) for first, layout in self.layouts.items()}
        self.prompt = False
        self.step += count
        self._masks.clear()
        self.rotary.clear()

    def truncate(self, count: int) -> None:
        """Take back the last ``count`` generated tokens. Raises ModelError where a cache policy remembers them."""
        if any(self.memory.values()):
            raise ModelError("decode: a cache policy that acts at generated tokens cannot be taken back")
        self.held = {layer: Held(*(t[:, :, : t.shape[2] - count] for t in held)) for layer, held in self.held.items()}
        keep = {first: layout.role.shape[1] - count for first, layout in self.layouts.items()}
        for first, layout in self.layouts.items():
            shorter: Any = [None if field is None else field[:, : keep[first]] for field in layout]
            self.layouts[first] = Layout(*shorter)
        self.step -= count
        self._masks.clear()
        self.rotary.clear()

    def take_rows(self, index: Int[Tensor, " rows"]) -> "Run":
        """The run of a batch whose row i is row ``index[i]`` of this one. What was cut of the prompt is forgotten."""
        taken = copy(self)
        batch = len(self.total)
        for name in ("layouts", "asks", "total", "held", "memory", "inner", "memo", "_signals", "_asks"):
            setattr(taken, name, _rows(getattr(self, name), index, batch))
        taken.kept, taken.deep, taken._masks, taken.rotary = {}, [], {}, {}
        return taken

    def mask(self, first: int, rows: int) -> Bool[Tensor, "batch 1 rows keys"] | None:
        """Which keys the last ``rows`` places of a stage may see; None when plain causality says it all."""
        if first not in self._masks:
            self._masks[first] = self._build_mask(self.layouts[first], rows)
        return self._masks[first]

    def _build_mask(self, layout: Layout, rows: int) -> Bool[Tensor, "batch 1 rows keys"] | None:
        valid, block = layout.valid, layout.block
        if bool(valid.all()) and (block is None or bool((block[:, -rows:] < 0).all())):
            return None
        keys = valid.shape[1]
        causal = torch.ones(rows, keys, dtype=torch.bool, device=valid.device).tril(keys - rows)
        if block is not None:
            causal = causal | ((block[:, -rows:, None] == block[:, None, :]) & (block[:, None, :] >= 0))
        itself = torch.eye(keys, dtype=torch.bool, device=valid.device)[keys - rows :]
        return ((causal & valid[:, None, :]) | itself)[:, None]  # a padding row sees itself, so no row is empty

    def keys_signal(self, signal: Signal, layer: int) -> Tensor:
        """A signal over the keys of ``layer``; tokens generated since it was read have 0."""
        value = self.get(signal, layer)
        grown = self.layouts[self.stage(layer)].role.shape[1] - value.shape[signal.key_axis] if signal.axis else 0
        if not grown:
            return value
        return torch.nn.functional.pad(value, (0, 0) * (value.ndim - 1 - signal.key_axis) + (0, grown))

    def segment_seed(self, layout: Layout) -> Int[Tensor, " batch"]:
        """One integer per sample from the pixels of its images, whatever else is in the batch."""
        seed = self.seed()
        shown = seed.new_zeros(len(layout.image), len(seed) + 1).scatter(1, layout.image + 1, 1)  # 0: text
        return (shown[:, 1:] * (seed % 2**40)).sum(1)

    def visual_tokens(self, layers: int) -> list[float]:
        """Mean number of visual tokens per sample in each decoder layer."""
        return [float(self.layouts[self.stage(layer)].visual.sum(1).float().mean()) for layer in range(layers)]

    def cached_tokens(self, layers: int) -> list[float]:
        """Mean number of cache entries per sample and key/value head in each decoder layer."""
        counts = []
        for layer in range(layers):
            valid = self.held[layer].valid if layer in self.held else self.layouts[self.stage(layer)].valid[:, None]
            counts.append(float(valid.sum(2).float().mean()))
        return counts


def _rows(value: Any, index: Int[Tensor, " rows"], batch: int) -> Any:
    """Whatever a run holds, with the rows at ``index`` of every tensor that has the batch first."""
    if isinstance(value, Tensor):
        return value.index_select(0, index) if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _rows(part, index, batch) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rows(part, index, batch) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(_rows(part, index, batch) for part in value)
    return value
