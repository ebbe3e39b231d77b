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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm.kernels.grouped_mass import grouped_mass_attention
from vlm.kernels.received import received_attention
from vlm.kernels.visibility import Common
from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout, compact
from vlm.models.program.program import (
    LLM_IN,
    VIT_OUT,
    Keys,
    Peak,
    Program,
    Received,
    Regroup,
    Rewrite,
    Select,
    Signal,
    Tap,
    Tokens,
    check,
    signals_of,
)
from vlm.models.program.run import Run

ATTENTION = "vlm_program"
RUN = "vlm_run"
_ENGINES: "weakref.WeakKeyDictionary[nn.Module, Engine]" = weakref.WeakKeyDictionary()


class Engine:
    """A program lowered onto one decoder: what the hooks and the model call. Made by :func:`attach`."""

    def __init__(self, decoder: Any, program: Program, impl: str = "auto") -> None:
        self.decoder = decoder
        self.program = program
        self.impl = impl  # of the attention operations
        self.rewrites = [op for _, op in program if isinstance(op, Rewrite)]
        self.cuts: dict[int, Select] = {}
        self.regroups: dict[int, list[Regroup]] = {}
        self.taps: dict[int, list[Tap]] = {}
        for site, op in program:
            if isinstance(op, Select) and site != VIT_OUT:
                self.cuts[0 if site == LLM_IN else site.layer] = op
            elif isinstance(op, Regroup):
                self.regroups.setdefault(site.layer, []).append(op)
            elif isinstance(op, Tap):
                self.taps.setdefault(site.layer, []).append(op)
        self.feature_cut = next((op for site, op in program if site == VIT_OUT and isinstance(op, Select)), None)
        needs = signals_of(program)
        self.peaks = {s.layer: [p for p in needs if isinstance(p, Peak) and p.layer == s.layer] for s in needs}
        self.received = {s.layer: s for s in needs if isinstance(s, Received)}

    @property
    def first_hooked(self) -> int:
        """The first decoder layer whose input must be looked at; the number of layers when there is none."""
        layers = [k for k in self.cuts if k > 0] + [k for k, peaks in self.peaks.items() if peaks]
        return min(layers, default=len(self.decoder.layers))

    @property
    def sees_attention(self) -> bool:
        return bool(self.received or self.regroups)

    def tag(self, run: Run) -> dict[str, Run]:
        """Keyword arguments that the decoder's forward must carry for ``run``; none if nothing acts inside it."""
        inside = self.sees_attention or self.first_hooked < len(self.decoder.layers)
        return {RUN: run} if inside else {}

    # vit.out and llm.in: called by the model

    def choose_features(
        self, features: Float[Tensor, "images tokens width"], seed: Int[Tensor, " images"]
    ) -> Bool[Tensor, "images tokens"] | None:
        """Which features of each image stay, or None when the program does not cut at ``vit.out``."""
        if self.feature_cut is None or not len(features):
            return None
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return _choose(self.feature_cut, Tokens(features.detach(), valid, seed, _no_signal), torch.ones_like(seed))

    def enter_language(self, hidden: Float[Tensor, "batch length width"], run: Run) -> Tensor:
        """Apply the cut at ``llm.in``; ``run`` then holds the layout of what goes on."""
        return self._cut(0, hidden, run) if 0 in self.cuts else hidden

    # llm.before[k] and hidden-state signals: called by the pre-hook of every decoder layer from the first that matters

    def enter_layer(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        run, hidden = _run_of(kwargs), args[0]
        if run.prompt:
            if layer > 0 and layer in self.cuts:
                hidden = self._cut(layer, hidden, run)
            for signal in self.peaks.get(layer, ()):
                run.signals[signal] = _peak(hidden.detach(), signal)
        first = run.stage(layer)
        if first == 0:
            return None
        layout = run.layouts[first]
        rows = hidden.shape[1]
        rotary = self.decoder.rotary_emb(hidden, position_ids=layout.position_ids(rows))
        kwargs = kwargs | {
            "attention_mask": run.mask(first, rows),
            "position_ids": layout.position[:, -rows:],
            "position_embeddings": rotary,
        }
        return (hidden, *args[1:]), kwargs

    def _cut(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        """Drop what the cut at ``layer`` drops. Made once: a recomputed layer gets the selection of the first pass."""
        if layer not in run.kept:
            run.kept[layer] = self._make_cut(layer, hidden, run)
        index = run.kept[layer]
        return hidden if index is None else hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))

    def _make_cut(self, layer: int, hidden: Tensor, run: Run) -> Int[Tensor, "batch kept"] | None:
        """Choose at ``layer`` and enter the new stage in ``run``; the kept places, None when all stay."""
        op, layout = self.cuts[layer], run.layouts[run.stage(layer)]
        place, valid = compact(layout.visual, "right")  # [B,P] places of the visual tokens of each sample
        if place.shape[1] == 0:
            return None
        x = hidden.detach().gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))
        images = _count_images(layout)
        tokens = Tokens(x, valid, run.segment_seed(layout), lambda signal: run.signals[signal].gather(1, place))
        kept = _choose(op, tokens, images)
        if kept is None:
            return None
        keep = layout.valid & ~layout.visual  # text stays
        keep = keep.scatter(1, place, kept | keep.gather(1, place))
        index, real = compact(keep, run.side)
        cut = layout.take(index, real)
        run.add_stage(layer, cut.reindexed() if op.position == "reindex" else cut)
        return index

    # attn[l]: called by the registered attention function

    def attend(self, run: Run, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float | None) -> Tensor:
        """Read the signals of this layer and reweigh its attention. ``out`` is plain attention [B,Q,H,D]."""
        layout = run.layouts[run.stage(layer)]
        common = self._common(run, layer, q.shape[2], scale)
        if layer in self.received:
            with torch.no_grad():
                last = layout.last(layout.valid)[:, None] - (k.shape[2] - q.shape[2])  # [B,1], index into q
                got = received_attention(q, k, None, last, impl=self.impl, **common)
            run.signals[self.received[layer]] = got.mean(1)  # [B,K]
        for op in self.regroups.get(layer, ()):
            out = self._regroup(op, layout, run, q, k, v, out, common)
        for tap in self.taps.get(layer, ()):
            tap.receive(run.signals[tap.signal], layout)
        return out

    def _common(self, run: Run, layer: int, rows: int, scale: float | None) -> Common:
        """Indices and groups are right by construction; looking at their values would wait for the GPU."""
        first = run.stage(layer)
        padded = run.mask(first, rows) is not None
        return {"key_valid": run.layouts[first].valid if padded else None, "scale": scale, "validate": False}

    def _regroup(
        self, op: Regroup, layout: Layout, run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor, common: Common
    ) -> Tensor:
        rows, keys = q.shape[2], k.shape[2]
        after = layout.last(layout.visual)  # [B], -1 for a sample without an image
        start = max(int(after.masked_fill(after < 0, keys).min()) + 1 - (keys - rows), 0)
        if start >= rows:
            return out
        place = torch.arange(keys - rows + start, keys, device=q.device)
        chosen = (after[:, None] >= 0) & (place > after[:, None]) & layout.valid[:, place]  # [B, rows - start]
        groups = op.groups(Keys(layout, run.keys_signal))
        new, _ = grouped_mass_attention(
            q[:, :, start:], k, v, groups, rule=op.rule, row_sel=chosen, impl=self.impl, **common
        )
        tail = torch.where(chosen[:, :, None, None], new.transpose(1, 2), out[:, start:])
        return torch.cat([out[:, :start], tail], 1)


def _run_of(kwargs: Mapping[str, Any]) -> Run:
    """The run of the pass that calls. Raises ModelError when it did not travel with the pass."""
    if RUN not in kwargs:
        raise ModelError(
            "attach: under a program the language model runs only as a part of its vision-language model, and its "
            f"layers must hand their keyword arguments to attention; {RUN!r} is missing"
        )
    return kwargs[RUN]


def _no_signal(signal: Signal) -> Tensor:
    raise ModelError(f"vit.out: a selector there sees features only; it asked for {signal}")


def _choose(op: Select, tokens: Tokens, images: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"] | None:
    """The kept tokens, or None when all stay (so that a full budget changes nothing, to the bit)."""
    total = tokens.valid.sum(1)
    count = op.keep.count(total, images)
    if bool((count >= total).all()):
        return None
    with torch.no_grad():
        return op.selector.choose(tokens, count)


def _count_images(layout: Layout) -> Int[Tensor, " batch"]:
    image = layout.image.sort(1).values
    return ((image[:, 1:] != image[:, :-1]) & (image[:, 1:] >= 0)).sum(1) + (image[:, 0] >= 0)


def _peak(hidden: Float[Tensor, "batch length width"], signal: Peak) -> Float[Tensor, "batch length"]:
    x = hidden.float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).abs()
    return x[..., list(signal.dims)].amax(-1) if signal.dims else x.amax(-1)


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
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    engine = _ENGINES.get(module)
    if engine is not None:
        layer: Any = module.layer_idx
        out = engine.attend(_run_of(kwargs), layer, query, key, value, out, scaling)
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
    check(program, model.decoder_facts)
    language, decoder = model.language, model.decoder
    engine = Engine(decoder, program, impl)
    if any(engine.cuts) or engine.sees_attention:
        _check_decoder(language, decoder)
    hooks = []
    before = language.config._attn_implementation
    try:
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
    if config._attn_implementation != "sdpa":
        found = config._attn_implementation
        raise ModelError(f"attach: programs inside the language model replace sdpa attention; found {found!r}")
