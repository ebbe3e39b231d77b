"""A program inside a vision encoder: what its blocks are made to show and to drop.

Blocks are modules of timm, Transformers or OpenCLIP, used as they are. A hook around a block enters a function mode
that sees the block's call of ``scaled_dot_product_attention`` (OpenCLIP: ``multi_head_attention_forward``), so queries,
keys and values are the library's own, after its norms, and attention needs no eager version. Cuts drop tokens from what
leaves a block, or, between attention and MLP, from what enters its MLP.

Under gradient checkpointing a block runs again in the backward pass, maybe after other images went through. What was
known when it began is remembered with the storage of its input, for as long as that lives: checkpointing keeps it and
hands it in again, so each block finds the state and the cuts of its own pass.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from vlm.models.encoder import Encoder
from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.debias import PatchPlace, PatchShown, raster_share
from vlm.models.program.program import VIT_OUT, Position, Program, Select, Tokens, in_encoder, needs_of
from vlm.models.program.quota import divide
from vlm.models.program.reduce import Reduced
from vlm.models.program.segments import places, rows_at
from vlm.models.program.signals import Attention, Signal

# Where a block's second half begins, and what it consists of: timm, Transformers' CLIP and SigLIP, its DINOv2.
_HALVES = (("norm1", "attn", "norm2"), ("layer_norm1", "self_attn", "layer_norm2"), ("norm1", "attention", "norm2"))


class Cut(NamedTuple):
    """What a cut in one place made of the patches: a replay of it needs no choice."""

    kept: Bool[Tensor, "images patches"]
    wanted: Int[Tensor, " images"]


class Encoding:
    """What is known of one pass through the encoder: the patches that are left, and the signals read so far.

    image: the image that each view shows. place: raster number of each patch in its view, valid: which are there,
    real: which show some of the picture (the others are seen by attention, but no cut keeps them), size: how many
    patches each is the mean of. total: real patches of a view before any cut. replay: a block runs again for its
    gradient. columns: of a view's grid. padded: whether any patch is not there. seed: gives an integer of each view's
    pixels.
    """

    def __init__(
        self,
        seed: Callable[[], Int[Tensor, " views"]],
        image: Int[Tensor, " views"],
        real: Bool[Tensor, "views patches"],
        columns: int | Int[Tensor, "views 1"],
    ) -> None:
        self.seed, self.image, self.real, self.columns = seed, image, real, columns
        self.total = real.sum(1)
        self.place = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        self.valid = torch.ones_like(real)
        self.size: Float[Tensor, "views patches"] | None = None
        self.weigh = self.cut = self.padded = self.replay = False
        self.cut_at: dict[str, Cut | None] = {}
        self.signals: dict[Signal, Tensor] = {}

    def snapshot(self, with_signals: bool) -> "Encoding":
        """What a replay of the next block needs. Cuts are shared: those of the block are yet to be made."""
        state = copy.copy(self)
        state.signals = dict(self.signals) if with_signals else {}
        state.replay = True
        return state

    @property
    def candidates(self) -> Bool[Tensor, "views patches"]:
        return self.valid & self.real

    def tokens(self, x: Float[Tensor, "views patches width"]) -> Tokens:
        return Tokens(
            x,
            self.candidates,
            self.seed,
            self.signals.__getitem__,
            self.total,
            torch.ones_like(self.total),
            self.image[:, None].expand(self.place.shape),
            self.place // self.columns,
            self.place % self.columns,
            self.size,
        )

    def count(self, keep: Budget) -> Int[Tensor, " views"]:
        """Patches that each view may keep: what an image may, divided among its views by their real patches."""
        there = self.candidates.sum(1)
        if len(self.image) == int(self.image[-1]) + 1:  # a view an image
            return keep.count(self.total, torch.ones_like(self.total)).minimum(there)
        count = torch.zeros_like(there)
        for image in range(int(self.image[-1]) + 1):
            mine = self.image == image
            total, limit = self.total[mine].tolist(), there[mine].tolist()
            count[mine] = count.new_tensor(divide(keep.of(sum(total)), total, limit))
        return count

    def take(self, reduced: Reduced, needed: Collection[Signal] = ()) -> None:
        """Only these patches are left; signals that are still needed come along."""
        at = reduced.place
        self.signals = {s: s.take(value, at) for s, value in self.signals.items() if s in needed}
        size = self.size if self.size is not None else torch.ones_like(self.place, dtype=torch.float32)
        self.size = reduced.size if reduced.size is not None else size.gather(1, at)
        whole = self.place.shape[1]
        self.place, self.real, self.valid = self.place.gather(1, at), self.real.gather(1, at), reduced.valid
        self.padded = not bool(self.valid.all())
        self.cut = self.cut or self.place.shape[1] != whole or self.padded


class VisionEngine:
    """The encoder's part of a program, lowered onto its blocks. Made by ``attach``."""

    def __init__(self, encoder: Encoder, program: Program, layers: int, impl: str) -> None:
        self.encoder, self.impl = encoder, impl
        self.cuts = {str(site): op for site, op in program if isinstance(op, Select) and in_encoder(site)}
        self.out = next((op for site, op in program if site == VIT_OUT and isinstance(op, Select)), None)
        needs = {s for _, op in program for s in needs_of(op, layers) if s.part == "vision"}
        self.given = [s for s in needs if s.of_inputs]
        needs.difference_update(self.given)
        self.needs = {layer: [s for s in needs if s.layer == layer] for layer in {s.layer for s in needs}}
        self.later = self._needed_later()
        self.now: Encoding | None = None
        self._entered: Any = WeakIdKeyDictionary()  # storage of a block's input -> block -> what was known then

    def _needed_later(self) -> dict[str, set[Signal]]:
        """For each cut the signals that the cuts behind it read: only those go along."""
        order = [f"vit.{place}[{block}]" for block in range(len(self.encoder.blocks)) for place in ("mid", "after")]
        needed, later = set(self.out.selector.needs if self.out else ()), {}
        for site in reversed([site for site in order if site in self.cuts]):
            later[site] = set(needed)
            needed.update(self.cuts[site].selector.needs)
        return later

    @property
    def position(self) -> Position:
        """What becomes of position ids: the wish of the last cut."""
        ops = [*self.cuts.values(), *([self.out] if self.out else [])]
        return ops[-1].position if ops else "keep"

    @property
    def acts(self) -> bool:
        return bool(self.cuts or self.out)

    def hook(self) -> list[RemovableHandle]:
        """Hooks on every block that must be watched or cut. Raises ModelError for a block that cannot be."""
        for number, block in enumerate(self.encoder.blocks):
            if f"vit.mid[{number}]" in self.cuts:
                _halves(block)
        if not self.acts and not self.needs:
            return []
        whole: Any = self.encoder
        handles = [whole.register_forward_hook(self._after, always_call=True)]
        for number, block in enumerate(self.encoder.blocks):
            if self.cuts or number in self.needs:
                watch = self.watcher(number, block)
                handles.append(block.register_forward_pre_hook(watch.enter, with_kwargs=True))
                # before the hooks by which Transformers collects hidden states, so that those are cut too
                handles.append(block.register_forward_hook(watch.leave, prepend=True, always_call=True))
        return handles

    def watcher(self, number: int, block: nn.Module) -> "Around":
        """The hooks of a block."""
        return Around(self, number, block)

    def begin(
        self,
        seed: Callable[[], Int[Tensor, " views"]],
        image: Int[Tensor, " views"],
        real: Bool[Tensor, "views patches"] | None = None,
        own_columns: Int[Tensor, "views 1"] | None = None,
        shown: Callable[[], Float[Tensor, "views patches"]] | None = None,
    ) -> None:
        """A pass begins; seed, image and real as in :class:`Encoding`, by default all of a view is real.

        own_columns: of pictures that each have a grid of their own; what is not real then is no patch at all, and the
        encoder hides it from attention until the engine does. shown: gives how much of each patch shows the picture.
        """
        rows, columns = self.encoder.grid
        if real is None:
            real = torch.ones(len(image), rows * columns, dtype=torch.bool, device=image.device)
        now = Encoding(seed, image, real, columns if own_columns is None else own_columns)
        if own_columns is not None:
            now.valid = real
            now.cut = now.padded = not bool(real.all())
        self.start(now, shown)

    def start(self, now: Encoding, shown: Callable[[], Float[Tensor, "views patches"]] | None = None) -> None:
        """A pass of which that is known begins."""
        self.now = now
        for signal in self.given:
            now.signals[signal] = self._enter(signal, now.valid, shown)

    def _enter(self, signal: Signal, valid: Tensor, shown: Callable[[], Tensor] | None) -> Tensor:
        """A signal that is known before the pass."""
        if isinstance(signal, PatchPlace):
            return raster_share(valid)
        if isinstance(signal, PatchShown) and shown is not None:
            return shown()
        raise ModelError(f"vit: this model does not tell {signal}")

    def finish(self, features: Float[Tensor, "views patches width"]) -> Reduced | None:
        """The features that go to the connector, or None when all do as they are. Makes the cut at ``vit.out``."""
        now, self.now = self.now, None
        assert now is not None
        tokens = now.tokens(features)
        if self.out is not None and (choice := self._choose("vit.out", self.out, now, tokens)) is not None:
            reduced = _reduce(self.out, tokens, choice)
            now.take(reduced)
            return reduced._replace(place=now.place)
        return Reduced(now.place, features, now.valid) if now.cut else None

    def _after(self, encoder: Any, args: tuple, output: Any) -> None:
        if output is None:  # it raised, so nothing will finish this pass
            self.now = None

    # called by the hooks of every block

    def begin_block(self, number: int, x: Float[Tensor, "*rows width"]) -> None:
        """Remember what is known as a block begins, or recall it when the block is run again in the backward pass."""
        if not self.cuts:
            return
        storage = x.untyped_storage()
        before = self._entered.setdefault(storage, {})
        if self.now is not None:
            cuts = (self.cuts.get(f"vit.{place}[{number}]") for place in ("mid", "after"))
            before[number] = self.now.snapshot(any(cut and cut.selector.reduce for cut in cuts))
        elif number in before:
            self.now = copy.copy(before[number])
        elif torch._C._current_graph_task_id() == -1:
            before[number] = None  # a pass without a program: no image, or the encoder on its own
        else:
            raise ModelError(
                f"vit: block {number} is run again in the backward pass on a copy of its input (activation offloading?)"
                ", so the cuts of its first pass cannot be found"
            )

    def end_block(self) -> None:
        if self.now is not None and self.now.replay:
            self.now = None

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        """Enter the signals of a block from its attention call (before merged patches are weighed)."""
        now = self.now
        if now is None or not self.needs.get(layer):
            return
        valid = self._with_prefix(now.valid)
        common: Any = {"causal": False, "scale": scale, "validate": False}
        common["key_valid"] = valid if now.padded else None
        seen = Attention(q, k, v, valid, common, self.impl, prefix=self.encoder.prefix, memo={})
        with torch.no_grad():
            for signal in self.needs[layer]:
                now.signals[signal] = signal.read(seen).detach()

    def bias(self, like: Tensor) -> Float[Tensor, "images 1 1 tokens"] | None:
        """What is added to the logits of each key: padding hidden, merged tokens weighed; None: nothing."""
        now = self.now
        weighed = now is not None and now.weigh and now.size is not None
        if now is None or not (now.padded or weighed):
            return None
        bias = torch.zeros(now.valid.shape, dtype=like.dtype, device=like.device)
        if weighed and now.size is not None:
            wide = torch.promote_types(like.dtype, torch.float32)
            bias = now.size.clamp_min(1).to(wide).log().to(like.dtype)
        if now.padded:
            bias = bias.masked_fill(~now.valid, -torch.inf)
        return F.pad(bias, (self.encoder.prefix, 0))[:, None, None]

    def reduce(self, site: str, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*fewer width"]:
        """Make the cut at ``site`` of a tensor with prefix tokens."""
        op, now = self.cuts.get(site), self.now
        if op is None or now is None:
            return x
        tokens = now.tokens(self.patches(now, x))
        choice = self._choose(site, op, now, tokens)
        if choice is None:
            return x
        reduced = _reduce(op, tokens, choice)
        now.weigh = now.weigh or op.weigh
        now.take(reduced, self.later[site])
        return self.put_back(now, reduced.features.to(x.dtype), x)

    def patches(self, now: Encoding, x: Tensor) -> Float[Tensor, "images patches width"]:
        """What may be cut of what leaves a block."""
        return x[:, self.encoder.prefix :]

    def put_back(self, now: Encoding, left: Float[Tensor, "images fewer width"], x: Tensor) -> Tensor:
        """What goes on after a cut of ``x``."""
        return torch.cat([x[:, : self.encoder.prefix], left], 1)

    def _choose(self, site: str, op: Select, now: Encoding, tokens: Tokens) -> Cut | None:
        """Choose once; None when all stay, so that a full budget changes nothing, to the bit."""
        if site not in now.cut_at:
            now.cut_at[site] = None
            count, there = now.count(op.keep), now.candidates
            if not (op.exact and bool((count >= there.sum(1)).all())):
                with torch.no_grad():
                    kept = op.selector.choose(replace(tokens, x=tokens.x.detach()), count)
                if op.selector.reduce is not None or not bool((kept | ~there).all()):
                    now.cut_at[site] = Cut(kept, count)
        return now.cut_at[site]

    def _with_prefix(self, valid: Bool[Tensor, "images patches"]) -> Bool[Tensor, "images tokens"]:
        return F.pad(valid, (self.encoder.prefix, 0), value=True)


class Around:
    """Hooks around one block: a mode that sees its attention, a cut of what leaves it or enters its MLP."""

    def __init__(self, engine: VisionEngine, number: int, block: nn.Module) -> None:
        self.engine, self.number = engine, number
        # Transformers' layers take a mask and hand it to attention, also where they are run again without hooks.
        self.takes_mask = "attention_mask" in inspect.signature(block.forward).parameters
        self.modes: list[Watch] = []
        self.undo: list[Callable[[], None]] = []

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.engine.begin_block(self.number, args[0])
        bias = self.engine.bias(args[0])
        if getattr(self.engine.encoder, "max_patches", 0) and self.engine.now is not None:
            args, kwargs = _without_mask(args, kwargs)  # it is of the patches before any cut; the bias is of those left
        if bias is not None and self.takes_mask:
            args, kwargs = _mask_keys(args, kwargs, bias)
        mode = Watch(lambda *call: self.engine.read(self.number, *call), None if self.takes_mask else bias)
        self.modes.append(mode)
        mode.start()
        site = f"vit.mid[{self.number}]"
        if site in self.engine.cuts and self.engine.now is not None:
            half = self._first_half(block, args, kwargs)
            mode.stop()  # what is left is the MLP
            args = (self.engine.reduce(site, half), *args[1:])
        return args, kwargs

    def leave(self, block: nn.Module, args: tuple, output: Any) -> Any:
        mode = self.modes.pop() if self.modes else None
        while self.undo:
            self.undo.pop()()
        try:
            if mode is not None:
                mode.stop()
            if output is None or mode is None or self.engine.now is None:
                return None  # the block raised, or runs without the program
            self.look(block, mode)
            hidden = output[0] if isinstance(output, tuple) else output
            cut = self.engine.reduce(f"vit.after[{self.number}]", hidden)
            if cut is hidden:
                return None
            return (cut, *output[1:]) if isinstance(output, tuple) else cut
        finally:
            self.engine.end_block()

    def look(self, block: nn.Module, mode: "Watch") -> None:
        """Refuse a block whose attention did not show: its signals would be missing, its padding would be seen."""
        if mode.calls != 1 and (self.number in self.engine.needs or mode.bias is not None):
            raise ModelError(
                f"vit: block {self.number} ({type(block).__name__}): expected one call of torch's "
                f"scaled_dot_product_attention, which programs in the encoder watch; found {mode.calls} "
                "(fused attention off, or attention implementation other than sdpa?)"
            )

    def _first_half(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Run the block up to its MLP, and leave it the MLP alone to do: its attention gives zeros."""
        first, attention, norm = _halves(block)
        caught: list[Tensor] = []

        def stop(module: nn.Module, args: tuple) -> None:
            caught.append(args[0])
            raise _HalfWay

        self._set(block, "gradient_checkpointing", False)  # of Transformers: it would recompute a whole block
        handle = norm.register_forward_pre_hook(stop)
        try:
            block.forward(*args, **kwargs)
        except _HalfWay:
            pass
        finally:
            handle.remove()
        returns_pair = type(attention).__module__.startswith("transformers.")
        zeros: Callable[..., Any] = lambda hidden_states, *args, **kwargs: (  # noqa: E731
            (torch.zeros_like(hidden_states), None) if returns_pair else torch.zeros_like(hidden_states)
        )
        self._set(attention, "forward", zeros)
        self._set(first, "forward", lambda hidden_states: hidden_states)  # nobody reads it any more
        return caught[0]

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of this instance until the block is left."""
        own = vars(module)
        restore = {name: own[name]} if name in own else {}
        self.undo.append(lambda: own.pop(name, None) if not restore else own.update(restore))
        own[name] = value


class _HalfWay(Exception):
    """Raised to leave a block at its MLP."""


def _halves(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A block's first norm, its attention and the norm before its MLP. Raises ModelError for a block that is built
    otherwise."""
    for names in _HALVES:
        if all(hasattr(block, name) for name in names) and type(block).__name__ != "ResPostBlock":
            first, attention, norm = (getattr(block, name) for name in names)
            return first, attention, norm
    raise ModelError(f"vit.mid: expected blocks of attention, then norm and MLP; found {type(block).__name__}")


class Watch(TorchFunctionMode):
    """Shows attention calls to ``see(q, k, v, scale)`` and adds ``bias`` to the logits of their keys."""

    def __init__(self, see: Callable[..., None], bias: Tensor | None) -> None:
        super().__init__()
        self.see, self.bias, self.calls, self.on = see, bias, 0, False

    def start(self) -> None:
        self.__enter__()
        self.on = True

    def stop(self) -> None:
        if self.on:
            self.on = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs = {**kwargs, **dict(zip(names, args, strict=False))}
            self.see(kwargs["query"], kwargs["key"], kwargs["value"], kwargs.get("scale"))
            if self.bias is not None:
                kwargs["attn_mask"] = _join(kwargs.get("attn_mask"), self.bias)
            return func(**kwargs)
        if func is F.multi_head_attention_forward:
            self.calls += 1
            self.see(*_projected(*args[:7]), None)
        return func(*args, **kwargs)


def _join(mask: Tensor | None, bias: Float[Tensor, "images 1 1 tokens"]) -> Tensor:
    """A mask of scaled_dot_product_attention, with ``bias`` on its keys."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, -torch.inf)
    return mask + bias


def _mask_keys(args: tuple, kwargs: dict[str, Any], bias: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a layer of Transformers, with ``bias`` in its mask: second, or by name."""
    if len(args) > 1:
        return (args[0], _join(args[1], bias), *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": _join(kwargs.get("attention_mask"), bias)}


def _without_mask(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if len(args) > 1:
        return (args[0], None, *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": None}


def _projected(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, tokens, dim] of a call of ``multi_head_attention_forward``."""
    biases = bias.chunk(3) if bias is not None else (None, None, None)
    parts = []
    for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True):
        projected = F.linear(x, w, b)  # [T,B,C]
        parts.append(projected.unflatten(2, (heads, -1)).permute(1, 2, 0, 3))
    return parts[0], parts[1], parts[2]


def _reduce(op: Select, tokens: Tokens, choice: Cut) -> Reduced:
    """The tokens that go on; places are numbers among ``tokens``."""
    if op.selector.reduce is not None:
        return op.selector.reduce(tokens, choice.kept, choice.wanted)
    place, valid = places(choice.kept & tokens.valid)
    return Reduced(place, rows_at(tokens.x, place), valid)
