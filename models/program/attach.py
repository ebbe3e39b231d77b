"""The one module that knows Transformers' seams: it makes a language model run a program.

    with attach(model, program):
        ...                      # forward, training step or generation under the program
    # hooks, attention implementation and config are as before

Three seams, none of which patches a class or copies modeling code: a registered attention function (registered
for masks too, otherwise Transformers drops the padding mask silently), a forward pre-hook on decoder layers, and
calls from the composed model at ``vit.out`` and ``llm.in``. A pre-hook rather than a decoder loop of our own: it
leaves each family's forward as it is. What a pass knows of its sequence (:class:`Run`) travels with it as a keyword
argument, through the decoder's layers to the attention function, so that gradient checkpointing recomputes a layer
with the sequence and the selection it had, whatever ran since.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm.kernels.visibility import Common
from vlm.models.errors import ModelError
from vlm.models.pack import ATTENTION as PACKED
from vlm.models.program.ahead import PROBE, Stop, Watch, probe
from vlm.models.program.cache import (
    Entries,
    Evict,
    EvictStep,
    ReadStep,
    Row,
    gather_entries,
    held_whole,
    pick,
    shorten,
)
from vlm.models.program.contexts import MAIN
from vlm.models.program.cutting import given, resequence, tokens_of
from vlm.models.program.inner import watch
from vlm.models.program.inside import hook_encoder, hook_layers, only_row, ops_at, put_row, regrouped, rescored
from vlm.models.program.layout import compact
from vlm.models.program.program import (
    LLM_IN,
    VIT_OUT,
    Control,
    Edit,
    Gate,
    Inside,
    Keys,
    Prepare,
    Program,
    Regroup,
    Rescore,
    Rewrite,
    Select,
    Tap,
    check,
    in_encoder,
    needs_of,
)
from vlm.models.program.run import Kept, Run
from vlm.models.program.signals import Attention, Given, Signal
from vlm.models.program.vision import VisionEngine

ATTENTION = "vlm_program"
RUN = "vlm_run"
_ENGINES: "weakref.WeakKeyDictionary[nn.Module, Engine]" = weakref.WeakKeyDictionary()


class Engine:
    """A program lowered onto one decoder: what the hooks and the model call. Made by :func:`attach`."""

    def __init__(self, model: Any, program: Program, impl: str = "auto") -> None:
        self.decoder = model.decoder
        self.program = program
        self.impl = impl  # of the attention operations
        layers = len(self.decoder.layers)
        self.prepares = [op for _, op in program if isinstance(op, Prepare)]
        self.rewrites = [op for _, op in program if isinstance(op, Rewrite)]
        self.control = next((op for _, op in program if isinstance(op, Control)), None)
        readers = [*self.rewrites, *([self.control] if self.control else [])]
        self.inner = sorted({layers for op in readers for layers in op.inner})
        self.asked = self.answered = 0  # prompts of the cascade, and those whose first answer stood
        self.cuts: dict[int, Select] = {}
        self.regroups = ops_at(program, Regroup)
        self.rescores = ops_at(program, Rescore)
        self.gates = ops_at(program, Gate)
        self.edits = ops_at(program, Edit)
        self.acts_in_layers = bool(self.gates or self.edits)
        self.edits_encoder = any(site.name == "vit.resid" for site, _ in program)
        self.taps = ops_at(program, Tap)
        self.evict = next((op for _, op in program if isinstance(op, Evict)), None)
        self.evict_step = next((op for _, op in program if isinstance(op, EvictStep)), None)
        self.read_step = next((op for _, op in program if isinstance(op, ReadStep)), None)
        for site, op in program:
            if isinstance(op, Select) and site != VIT_OUT and not in_encoder(site):
                self.cuts[0 if site == LLM_IN else site.layer] = op
        needs = {s for _, op in program for s in needs_of(op, layers) if s.part == "language"}
        self.watch = Watch(program, layers)
        self.given = [s for s in sorted(needs, key=repr) if isinstance(s, Given) and s not in self.watch.signals]
        self.states = _by_layer(s for s in needs if s.of_state)
        self.ahead = _by_layer(s for s in needs if s.ahead_of_layer)
        self.received = _by_layer(s for s in needs if not (s.of_state or s.ahead_of_layer or s.of_inputs))
        self.asks: Int[Tensor, "batch asks"] | None = None  # of the pass that begins, with the scores given to it
        self.scores: dict[Given, Tensor] = {}
        self.observer: Observer | None = None  # while there is one, the program rests
        # Whoever looks at generated tokens too; the others need their signals of the prompt only, some of them longer.
        renewed = [op for _, op in program if isinstance(op, Tap | Control)]
        self.renewed = {s for op in renewed for s in needs_of(op, layers)}
        self.lasting = self.renewed | {s for _, op in program if isinstance(op, Inside) for s in op.needs}
        vision: Any = getattr(model, "vision", None)
        lowered: Any = getattr(vision, "engine", VisionEngine)  # an encoder that packs its pictures has its own
        self.vision: VisionEngine | None = None if vision is None else lowered(vision, program, layers, impl)

    @property
    def first_hooked(self) -> int:
        """The first decoder layer whose input must be looked at; the number of layers when there is none."""
        layers = [k for k in self.cuts if k > 0] + [*self.states, *self.ahead]
        return 0 if self.caches else min(layers, default=len(self.decoder.layers))

    @property
    def caches(self) -> bool:
        """Whether the program acts on the cache."""
        return any(op is not None for op in (self.evict, self.evict_step, self.read_step))

    @property
    def sees_attention(self) -> bool:
        observes = self.watch.signals or any(one.observes for one in (*self.given, *self.prepares))
        return bool(self.received or self.ahead or self.regroups or self.rescores or self.caches or observes)

    def tag(self, run: Run) -> dict[str, Run]:
        """Keyword arguments that the decoder's forward must carry for ``run``; none if nothing acts inside it."""
        hooked = self.first_hooked < len(self.decoder.layers)
        return {RUN: run} if self.sees_attention or self.inner or self.acts_in_layers or hooked else {}

    # before a pass and at llm.in: called by the model

    def begin(self, model: Any, inputs: Any, weights: Tensor | None, asks: Int[Tensor, "batch asks"] | None) -> None:
        """Ask for the scores that come from outside, before the pass over ``inputs``."""
        if self.observer is None:
            if weights is not None and self.prepares:
                raise ModelError("prompt: this method changes prompts that are to be answered; found a training pass")
            if weights is not None and (self.rescores or self.acts_in_layers or self.edits_encoder):
                raise ModelError(
                    "mitigate: this method acts on the newest row of a text that grows, which training does not have; "
                    "give it to the rows of evaluate.compare, not to the recipe itself"
                )
            self.asks = asks
            with torch.no_grad():
                self.scores = {signal: signal.scores(model, inputs, weights) for signal in self.given}

    def enter_language(self, hidden: Float[Tensor, "batch length width"], run: Run) -> Tensor:
        """Apply the cut at ``llm.in``; ``run`` then holds the layout of what goes on."""
        if self.observer is not None:
            return hidden
        run.asks = self.asks
        for signal, scores in self.scores.items():
            run.put(signal, given(signal, scores, run) if signal.axis else scores)
        self.scores = {}
        return self._cut(0, hidden, run) if 0 in self.cuts else hidden

    # llm.before[k] and hidden-state signals: called by the pre-hook of every decoder layer from the first that matters

    def enter_layer(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        run, hidden = _run_of(kwargs), args[0]
        if self.observer is not None:
            return None
        if run.prompt:
            for signal in self.states.get(layer, ()):
                self._read_state(signal, layer, hidden.detach(), run)
            if layer in self.ahead and layer not in run.kept:
                self._look_ahead(layer, hidden, kwargs, run)
            if layer == self.watch.cut and layer not in run.kept:
                self.watch.finish(self, hidden, kwargs, run)
            if layer > 0 and layer in self.cuts:
                hidden = self._cut(layer, hidden, run)
        first = run.stage(layer)
        if first == 0 and (run.prompt or not run.held):
            return None
        # Once a cache is shorter than its sequence, the decoder's own mask, made from layer 0, fits no other layer.
        held = None if run.prompt else run.held.get(layer)
        heads = self.decoder.config.num_attention_heads
        mask = {"attention_mask": run.mask(first, hidden.shape[1]) if held is None else held.mask(heads)}
        return (hidden, *args[1:]), kwargs | mask | (self._positions(run, layer, hidden) if first else {})

    @torch.no_grad()
    def _read_state(self, signal: Signal, layer: int, hidden: Tensor, run: Run) -> None:
        if signal.of_layout:
            if layer not in run.kept:  # else a recomputed layer, whose sequence before the cut is no longer known
                run.put(signal, signal.read_layout(hidden, run.layouts[run.stage(layer)], run.asking(layer)))
        else:
            run.put(signal, signal.read_state(hidden, self.decoder))

    def _positions(self, run: Run, layer: int, hidden: Tensor) -> dict[str, Any]:
        first, rows = run.stage(layer), hidden.shape[1]
        layout, same = run.layouts[first], (first, rows, hidden.dtype, hidden.device)
        if same not in run.rotary:  # as in Transformers, once for all layers of a stage
            run.rotary[same] = self.decoder.rotary_emb(hidden, position_ids=layout.position_ids(rows))
        return {"position_ids": layout.position[:, -rows:], "position_embeddings": run.rotary[same]}

    def _look_ahead(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Run) -> None:
        """Read the signals that a cut at ``layer`` wants from the layer's own queries and keys: the layer is run up to
        its attention, which stops it."""
        before = run.stage(layer)
        more = {} if before == 0 else self._positions(run, layer, hidden)
        seen = self.seen_by(run, layer, probe(self.decoder.layers[layer].forward, hidden, {**kwargs, **more}))
        for signal in self.ahead[layer]:
            run.put(signal, signal.read(seen))

    def _cut(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        """Drop what the cut at ``layer`` drops. Made once: a recomputed layer gets the selection of the first pass."""
        if layer not in run.kept:
            run.kept[layer] = self._make_cut(layer, hidden, run)
        kept = run.kept[layer]
        return hidden if kept is None else kept.apply(hidden)

    def _make_cut(self, layer: int, hidden: Tensor, run: Run) -> Kept | None:
        """Choose at ``layer`` and enter the new stage in ``run``; None when all stay (so that a full budget changes
        nothing, to the bit)."""
        op, layout = self.cuts[layer], run.layouts[run.stage(layer)]
        place, valid = compact(layout.visual, "right")  # [B,P] places of the visual tokens of each sample
        if place.shape[1] == 0:
            return None
        tokens = tokens_of(hidden.detach(), layout, place, valid, run, layer)
        count = op.keep.count(run.total, tokens.images).minimum(valid.sum(1))
        if op.exact and bool((count >= valid.sum(1)).all()):
            return None
        with torch.no_grad():
            chosen = op.selector.choose(tokens, count)
        cut, index, real = resequence(op, tokens, chosen, count, layout, place, run.side)
        taken = layout.take(index, real)
        run.add_stage(layer, taken.reindexed() if op.position == "reindex" else taken, index)
        return cut

    # attn[l]: called by the registered attention function

    def attend(self, run: Run, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float | None) -> Tensor:
        """Read the signals of this layer and reweigh its attention. ``out`` is plain attention [B,Q,H,D]."""
        wanted = [s for s in self.received.get(layer, ()) if run.prompt or s in self.renewed]
        if wanted or self.watch.due(run, layer):
            seen = self._attention(run, layer, q, k, v, scale)
            with torch.no_grad():
                for signal in wanted:
                    run.put(signal, signal.read(seen).detach())
                self.watch.see(run, layer, seen)
        for op in self.regroups.get(layer, ()) if run.prompt else ():
            keys, common = self.sight(run, layer), self._common(run, layer, q.shape[2], scale)
            out = regrouped(op, q, k, v, out, keys, self.impl, common)
        if layer in self.rescores and run.prompt:
            (op,) = self.rescores[layer]
            out = put_row(out, *rescored(op, q, k, v, self.sight(run, layer), scale))
        for tap in self.taps.get(layer, ()) if run.stream == MAIN else ():
            tap.receive(run.get(tap.signal, layer), run.layouts[run.stage(layer)])
        return out

    def only_row(
        self, run: Run, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Float[Tensor, "batch 1 heads dim"] | None:
        """A generated token's attention where an op changes it; None where it is plain."""
        ops = () if run.prompt else self.rescores.get(layer) or self.regroups.get(layer)
        if not ops:
            return None
        return only_row(ops[0], q, k, v, self.sight(run, layer), self.impl, self._common(run, layer, 1, scale))

    def sight(self, run: Run, layer: int) -> Keys:
        """What an op inside the layer sees."""
        first = run.stage(layer)
        memo = None if run.prompt else run.memo.setdefault(first, {})
        return Keys(run.layouts[first], lambda signal: run.keys_signal(signal, layer), memo)

    def _attention(self, run: Run, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Attention:
        layout, common = run.layouts[run.stage(layer)], self._common(run, layer, q.shape[2], scale)
        asks, known = run.asking(layer), run.signals(layer).__getitem__
        rotary = getattr(getattr(self.decoder, "rotary_emb", None), "inv_freq", None)
        shown = (q.detach(), k.detach(), v.detach(), layout.valid, common, self.impl, layout, asks)
        return Attention(*shown, signal=known, frequencies=rotary)

    def seen_by(self, run: Run, layer: int, stop: Stop) -> Attention:
        return self._attention(run, layer, stop.q, stop.k, stop.k, stop.scale)

    def _common(self, run: Run, layer: int, rows: int, scale: float | None) -> Common:
        """Indices and groups are right by construction; looking at their values would wait for the GPU."""
        first = run.stage(layer)
        padded = run.mask(first, rows) is not None
        return {"key_valid": run.layouts[first].valid if padded else None, "scale": scale, "validate": False}

    # kv.decode: what a generated token's row reads

    def narrowed(
        self, run: Run, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
        """Keys and values that the row reads in this layer, which of them are real, and their places in the cache;
        None when it reads all."""
        if self.read_step is None or run.prompt:
            return None
        view = self._entries(run, layer, k.shape[1])
        marks = self.read_step.read(view, q[:, :, -1])
        if marks is None or bool((marks | ~view.held.valid).all()):
            return None
        index, real = pick(marks & view.held.valid)
        valid = None if bool(real.all()) else real
        return gather_entries(k, index), gather_entries(v, index), valid, index

    def have_read(
        self, run: Run, layer: int, q: Tensor, k: Tensor, valid: Tensor | None, index: Tensor | None, scale: Any
    ) -> None:
        """Show the policies the row of a generated token, which read the entries at ``index`` (None: all)."""
        for op in (self.read_step, self.evict_step):
            if op is None:
                continue
            view = self._entries(run, layer, k.shape[1])
            entries = view.held.place.shape[2]
            real = view.held.valid if index is None else valid
            real = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device) if real is None else real
            op.seen(view, Row(q[:, :, -1].detach(), k.detach(), real, index, entries, scale))

    # kv.prefill and kv.decode: called by the model after a pass

    @torch.no_grad()
    def close_pass(self, run: Run, cache: DynamicCache) -> None:
        """Evict what the program evicts: after the prompt and after each generated token."""
        if not self.caches or self.observer is not None:
            return
        if run.prompt:
            self._close_prompt(run, cache)
        elif self.evict_step is not None:
            for layer in range(len(cache.layers)):
                view = self._entries(run, layer, self._kv_heads(run, layer, cache))
                if (keep := self.evict_step.keep(view)) is not None:
                    self._shorten(run, cache, view, keep)

    def _close_prompt(self, run: Run, cache: DynamicCache) -> None:
        views = [self._entries(run, n, self._kv_heads(run, n, cache)) for n in range(len(cache.layers))]
        if self.evict is not None:
            for view, keep in zip(views, self.evict.keep(views), strict=True):
                self._shorten(run, cache, view, keep)
        if self.read_step is not None:
            for layer in range(len(views)):
                self.read_step.start(self._entries(run, layer, views[layer].kv_heads))
        if not self.lasting and not any(op.needs for op in self.rewrites):
            run.forget_signals()

    def _shorten(self, run: Run, cache: DynamicCache, view: Entries, keep: Tensor) -> None:
        short = shorten(cache, view.layer, view.held, keep)
        if short is not view.held:
            run.held[view.layer] = short

    def _kv_heads(self, run: Run, layer: int, cache: Any) -> int:
        return run.held[layer].place.shape[1] if layer in run.held else cache.layers[layer].keys.shape[1]

    def _entries(self, run: Run, layer: int, kv_heads: int) -> Entries:
        layout = run.layouts[run.stage(layer)]
        held = run.held.get(layer) or held_whole(layout, kv_heads)
        memory, shared = run.memory.setdefault(layer, {}), run.memory.setdefault(-1, {})
        return Entries(
            layer,
            layout,
            held,
            lambda signal: run.get(signal, layer),
            run.step,
            lambda: run.segment_seed(run.layouts[0]),
            memory,
            shared,
        )


Observer = Callable[[int, Attention], None]


def _by_layer(signals: Any) -> dict[int, list[Signal]]:
    found: dict[int, list[Signal]] = {}
    for signal in sorted(signals, key=repr):  # the same order in every process
        found.setdefault(signal.layer, []).append(signal)
    return found


def _run_of(kwargs: Mapping[str, Any]) -> Run:
    """The run of the pass that calls. Raises ModelError when it did not travel with the pass."""
    if RUN not in kwargs:
        raise ModelError(
            "attach: under a program the language model runs only as a part of its vision-language model, and its "
            f"layers must hand their keyword arguments to attention; {RUN!r} is missing"
        )
    return kwargs[RUN]


def _program_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.pop(PROBE, False):
        raise Stop(query, key, scaling)
    engine = _ENGINES.get(module)
    layer: Any = getattr(module, "layer_idx", None)
    run = _run_of(kwargs) if engine is not None else None
    if engine is not None and run is not None and engine.observer is not None:
        with torch.no_grad():
            engine.observer(layer, engine._attention(run, layer, query, key, value, scaling))
        engine = None
    index = valid = None
    if engine is not None and run is not None and (narrow := engine.narrowed(run, layer, query, key, value)):
        key, value, valid, index = narrow
        attention_mask = None
        if valid is not None:
            attention_mask = valid.repeat_interleave(query.shape[1] // valid.shape[1], 1)[:, :, None]
    out = None if engine is None or run is None else engine.only_row(run, layer, query, key, value, scaling)
    if out is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if engine is not None and run is not None:
        if not run.prompt:
            engine.have_read(run, layer, query, key, valid, index, scaling)
        out = engine.attend(run, layer, query, key, value, out, scaling)
    return out, None


AttentionInterface.register(ATTENTION, _program_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def attach(model: Any, program: Program, impl: str = "auto") -> Iterator[None]:
    """Run ``model`` (a :class:`~vlm.models.base.BaseVlm`) under ``program`` in this block.

    The empty program touches nothing, so the model is the bare model to the bit. On exit hooks, attention
    implementation and config are as before, whatever happened inside.

    ``impl`` names the implementation of the attention operations of :mod:`vlm.kernels` that the program calls; every
    one gives the same model.

    Raises ModelError when a program is already attached or does not fit the model.
    """
    if not program:
        yield
        return
    if model.engine is not None:
        raise ModelError("attach: a program is attached to this model already; join the two programs instead")
    check(program, model.facts)
    language, decoder = model.language, model.decoder
    engine = Engine(model, program, impl)
    if any(engine.cuts) or engine.sees_attention or engine.acts_in_layers:
        _check_decoder(language, decoder)
    hooks = []
    before = language.config._attn_implementation
    try:
        if engine.vision is not None:
            hooks += engine.vision.hook()
        hooks += hook_encoder(model, program, lambda: bool(engine.observer))
        hooks += watch(decoder, engine.inner, _run_of)
        acts = (engine.gates, engine.edits, _run_of, engine.sight, lambda: bool(engine.observer))
        hooks += hook_layers(decoder, *acts)
        for layer in range(engine.first_hooked, len(decoder.layers)):
            hook = lambda module, args, kwargs, layer=layer: engine.enter_layer(layer, args, kwargs)  # noqa: E731
            hooks.append(decoder.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
        if engine.sees_attention:
            for layer in decoder.layers:
                _ENGINES[layer.self_attn] = engine
            language.set_attn_implementation(ATTENTION)
        model.engine = engine
        yield
    finally:
        model.engine = None
        for handle in hooks:
            handle.remove()
        for layer in decoder.layers:
            _ENGINES.pop(layer.self_attn, None)
        if language.config._attn_implementation != before:
            language.set_attn_implementation(before)


def _check_decoder(language: Any, decoder: Any) -> None:
    config = language.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds.add("sliding_attention")
    if kinds != {"full_attention"}:
        raise ModelError(f"attach: programs inside the language model need full attention; found {sorted(kinds)}")
    if not all(hasattr(layer, "self_attn") for layer in decoder.layers) or not hasattr(decoder, "rotary_emb"):
        raise ModelError(f"attach: {type(decoder).__name__} has no decoder layers with self_attn and rotary_emb")
    if config._attn_implementation not in ("sdpa", PACKED):
        found = config._attn_implementation
        raise ModelError(f"attach: programs inside the language model replace sdpa attention; found {found!r}")
