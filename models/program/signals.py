"""Signals: the statistics that ops ask for. The engine reads each once, where it arises, and takes it along every cut.

A signal names its layer and says how it is read: from one attention call (:class:`Attention`) or from the state that
enters a layer. A new statistic is one class here. Signals carry no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.received import attention_rows, received_attention
from vlm.kernels.visibility import Common
from vlm.models.errors import ModelError
from vlm.models.program import scores
from vlm.models.program.kv_budget import Window
from vlm.models.program.layout import Layout, compact
from vlm.models.program.segments import rows_at, unit
from vlm.models.program.shape import DecoderShape

Rows = Literal["last", "text", "all"] | int | Window
Heads = Literal["mean", "each"]


class Attention(NamedTuple):
    """One attention call: queries of its last rows, all keys and values, and what stands where.

    layout: of the keys; None in a vision encoder. valid: which keys are real. prefix: keys before an encoder's patches
    (class token, registers). asks: keys whose rows ask for what follows, -1 where unused (see :class:`Received`).
    signal: values over these keys of a signal that was read before. frequencies: of the rotary positions. memo: what
    signals of this call share.
    """

    q: Float[Tensor, "batch heads rows dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    v: Float[Tensor, "batch kv_heads keys dim"]
    valid: Bool[Tensor, "batch keys"]
    common: Common
    impl: str
    layout: Layout | None = None
    asks: Int[Tensor, "batch asks"] | None = None
    prefix: int = 0
    signal: "Callable[[Signal], Tensor] | None" = None
    frequencies: Float[Tensor, " half"] | None = None
    memo: dict[Any, Tensor] | None = None

    def received(
        self,
        rows: Int[Tensor, "batch chosen"],
        weight: Float[Tensor, "batch chosen"] | None = None,
        reduce: str = "sum",
    ) -> Float[Tensor, "batch heads keys"]:
        """What each key gets from the rows of the given keys (-1: unused)."""
        rows = torch.where(rows >= 0, rows - (self.k.shape[2] - self.q.shape[2]), -1)
        how: Any = {"row_weight": weight, "reduce": reduce, "impl": self.impl}
        return received_attention(self.q, self.k, None, rows, **how, **self.common)

    def places(self, rows: Rows) -> Int[Tensor, "batch chosen"]:
        """The keys whose rows are meant by ``rows``, -1 where unused."""
        if rows == "last" and self.asks is not None:
            return self.asks
        number = self.valid.long().cumsum(1)
        wanted = self.valid
        if rows == "text" and self.layout is not None:
            wanted = question(self.layout, self.asks)
        elif rows != "all":
            count = rows.of(number[:, -1])[:, None] if isinstance(rows, Window) else 1 if rows == "last" else int(rows)
            wanted = wanted & (number > number[:, -1:] - count)
        wanted = wanted.clone()
        wanted[:, : self.k.shape[2] - self.q.shape[2]] = False  # rows of this call only
        index, real = compact(wanted, "right")
        return index.masked_fill(~real, -1)


def question(layout: Layout, asks: Int[Tensor, "batch asks"] | None) -> Bool[Tensor, "batch length"]:
    """The text after the last image of each sample, as far as a prompt has it: in training up to the first row after
    the image that asks, so that no answer has a say. A sample that has none is represented by its last token."""
    place = torch.arange(layout.role.shape[1], device=layout.role.device)
    image, end = layout.last(layout.visual)[:, None], layout.last(layout.valid)[:, None]  # [B,1]
    if asks is not None:
        end = torch.minimum(end, torch.where(asks > image, asks, layout.role.shape[1]).amin(1, keepdim=True))
    found = layout.valid & (place > image) & (place <= end)
    return found | ((place == end) & layout.valid & ~found.any(1, keepdim=True))


@dataclass(frozen=True)
class Signal:
    """A statistic of ``layer``. axis: where its keys (in an encoder: its patches) lie.

    part: which half of the model it is read in. of_state: it is read from the state that enters the layer, before a
    cut there; otherwise from the layer's attention. of_layout: a state's, which also looks at what stands where.
    of_inputs: it comes from outside, before the pass. ahead: read from what the layer's attention would be at its
    input, so that a cut there can ask for it.
    """

    layer: int
    part: ClassVar[Literal["language", "vision"]] = "language"
    of_state: ClassVar[bool] = False
    of_layout: ClassVar[bool] = False
    of_inputs: ClassVar[bool] = False
    axis: ClassVar[int] = 1

    @property
    def ahead_of_layer(self) -> bool:
        return False

    @property
    def key_axis(self) -> int:
        return self.axis

    def take(self, value: Tensor, index: Int[Tensor, "batch kept"]) -> Tensor:
        """What was read, at places of its sequence: of a shorter one after a cut, or of some of its tokens."""
        if not self.axis:
            return value
        shape, wide = [1] * value.ndim, [*value.shape]
        shape[0], shape[self.key_axis] = index.shape
        wide[self.key_axis] = index.shape[1]
        return value.gather(self.key_axis, index.reshape(shape).expand(wide))

    def read(self, seen: Attention) -> Tensor:
        raise NotImplementedError

    def read_state(self, hidden: Tensor, decoder: Any) -> Tensor:
        raise NotImplementedError

    def read_layout(self, hidden: Tensor, layout: Layout, asks: Int[Tensor, "batch asks"] | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Received(Signal):
    """Attention that each key gets from some rows: [batch, keys], or [batch, heads, keys] with ``heads="each"``.

    rows: ``"last"``, the rows that ask for what follows: a prompt's last token; in training the token before each
    answer (mean over answers). ``"text"``, the text after the last image (:func:`question`); ``"all"``; or a number,
    so many last rows; or a :class:`~vlm.models.program.kv_budget.Window`, as many last rows as it has for the prompt.
    Sums over rows but for ``"last"``.
    """

    rows: Rows = "last"
    heads: Heads = "mean"
    ahead: bool = False

    @property
    def ahead_of_layer(self) -> bool:
        return self.ahead

    @property
    def key_axis(self) -> int:
        return 1 if self.heads == "mean" else 2

    def read(self, seen: Attention) -> Tensor:
        rows = seen.places(self.rows)
        weight = None
        if self.rows == "last":
            weight = (1.0 / (rows >= 0).sum(1, keepdim=True).clamp_min(1)).expand(rows.shape).to(seen.q.dtype)
        got = seen.received(rows, weight)
        return got.mean(1) if self.heads == "mean" else got


@dataclass(frozen=True)
class KeyStates(Signal):
    """Keys of the layer, after the rotation: [batch, kv_heads, keys, dim]."""

    axis: ClassVar[int] = 2

    def read(self, seen: Attention) -> Tensor:
        return seen.k


@dataclass(frozen=True)
class ValueStates(Signal):
    """Values of the layer: [batch, kv_heads, keys, dim]."""

    axis: ClassVar[int] = 2

    def read(self, seen: Attention) -> Tensor:
        return seen.v


@dataclass(frozen=True)
class LastQueries(Signal):
    """Queries of the last ``rows`` real rows, after the rotation: [batch, heads, rows, dim]. Not one value per key."""

    rows: int = 1
    axis: ClassVar[int] = 0

    def read(self, seen: Attention) -> Tensor:
        return seen.q.gather(2, _rows_of(seen.places(self.rows) - (seen.k.shape[2] - seen.q.shape[2]), seen.q))


@dataclass(frozen=True)
class Hidden(Signal):
    """The state that enters the layer, [batch, keys, width]; ``normed``: after the decoder's final norm."""

    normed: bool = False
    of_state: ClassVar[bool] = True

    def read_state(self, hidden: Tensor, decoder: Any) -> Tensor:
        return decoder.norm(hidden) if self.normed else hidden


@dataclass(frozen=True)
class Peak(Signal):
    """Largest absolute value of the state that enters the layer after RMS normalisation without gain, over ``dims``
    (all dimensions when empty), [batch, keys]. Read on the prompt; generated tokens get 0."""

    dims: tuple[int, ...] = ()
    of_state: ClassVar[bool] = True

    def read_state(self, hidden: Tensor, decoder: Any) -> Tensor:
        x = hidden.float()
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).abs()
        return x[..., list(self.dims)].amax(-1) if self.dims else x.amax(-1)


@dataclass(frozen=True)
class Raters(Signal):
    """Which tokens of the question rate the visual ones in SparseVLM, [batch, keys] bool, judged once on the state
    that enters ``layer``: see :func:`~vlm.models.program.scores.text_raters`. Where none does, the question's last."""

    layer: int = 0
    of_state: ClassVar[bool] = True
    of_layout: ClassVar[bool] = True

    def read_layout(self, hidden: Tensor, layout: Layout, asks: Int[Tensor, "batch asks"] | None) -> Tensor:
        asked = question(layout, asks)
        (seen, there), (words, real) = compact(layout.visual, "right"), compact(asked, "right")
        chosen = scores.text_raters(rows_at(hidden, seen), rows_at(hidden, words), there, real)
        last = torch.arange(words.shape[1], device=words.device) == real.sum(1, keepdim=True) - 1
        chosen = chosen | (last & ~chosen.any(1, keepdim=True))
        return torch.zeros_like(asked, dtype=torch.long).scatter_add(1, words, (chosen & real).long()) > 0


@dataclass(frozen=True)
class Rated(Signal):
    """Attention that each visual token gets from the :class:`Raters`, mean over them and heads: [batch, keys].

    gravity: attention is first divided by what rotary positions alone would make of it. heads: mean over so many heads
    only, those with the largest mass on visual tokens. See :func:`~vlm.models.program.scores.rated`.
    """

    gravity: bool = False
    heads: int | None = None

    def read(self, seen: Attention) -> Tensor:
        assert seen.signal is not None and seen.layout is not None
        index, real = compact(seen.signal(Raters()), "right")
        rows = index.masked_fill(~real, -1)
        if not self.gravity and self.heads is None:
            weight = real.to(seen.q.dtype) / real.sum(1, keepdim=True).clamp_min(1)
            return seen.received(rows, weight).mean(1)
        before = seen.k.shape[2] - seen.q.shape[2]
        by_row = attention_rows(seen.q, seen.k, rows - real * before, **seen.common)  # [B,H,R,K]
        if self.gravity:
            by_row = by_row / self._gravity(seen, seen.layout, index)[:, None]
        return scores.rated(by_row.masked_fill(~seen.layout.visual[:, None, None], 0), real, self.heads)

    def _gravity(self, seen: Attention, layout: Layout, rows: Tensor) -> Float[Tensor, "batch rows keys"]:
        if seen.frequencies is None or layout.axes is not None:
            raise ModelError(
                "sparsevlm: version v2 divides attention by what rotary positions on one axis make of it, which this "
                "language model does not have; use v1.5"
            )
        apart = (layout.position.gather(1, rows)[..., None] - layout.position[:, None]).abs()
        return scores.rotary_decay(apart, seen.q.shape[3], theta=seen.frequencies)


@dataclass(frozen=True)
class RasterShare(Signal):
    """Place of each visual token among its image's, before any cut in the language model: 0 for the first, 1 for the
    last, [batch, keys]; 0 for text."""

    layer: int = 0
    of_state: ClassVar[bool] = True
    of_layout: ClassVar[bool] = True

    def read_layout(self, hidden: Tensor, layout: Layout, asks: Int[Tensor, "batch asks"] | None) -> Tensor:
        own = (layout.image + 1)[..., None]  # [B,K,1], 0 is text
        count = torch.nn.functional.one_hot(own[..., 0]).cumsum(1)  # [B,K,images + 1] tokens of each so far
        number = count.gather(2, own) - 1
        total = count[:, -1:].expand_as(count).gather(2, own)
        return (number / (total - 1).clamp_min(1))[..., 0].masked_fill(~layout.visual, 0)


Scores = Callable[[Any, Any, Tensor | None], Float[Tensor, "batch visual"]]


@dataclass(frozen=True)
class Given(Signal):
    """Scores that come from outside: ``scores(model, inputs, weights)`` is asked once before each pass, without
    gradient, and gives one number for each visual token of each row in order, padded on the right; [batch, keys].

    inputs and weights are those of the pass (weights None but in training). observes: it runs the model itself, under
    :func:`~vlm.models.program.observe.observe`. watch: makes a watcher, which is shown (layer, attention) of all layers
    of a bare pass and then has the same scores as ``total``; see :class:`~vlm.models.program.ahead.Watch`.
    """

    layer: int = 0
    scores: Scores = field(kw_only=True, repr=False)
    observes: bool = False
    watch: Callable[[], Any] | None = field(default=None, repr=False)
    of_inputs: ClassVar[bool] = True


@dataclass(frozen=True)
class VisualFlow(Signal):
    """FlowCut's score inside the language model, [batch, keys], 0 for text: what flows from each visual token to the
    rows that ask (a prompt's last token; mean over several in training).

    (Attention among visual tokens alone + softmax of the products of values, both means over heads) times the L1 norm
    of the mean value. Source: FlowCut (NeurIPS 2025), official code for LLaVA-NeXT and Qwen2-VL.
    """

    def read(self, seen: Attention) -> Tensor:
        assert seen.layout is not None
        rows, keys = seen.places("last"), seen.k.shape[2]
        visible = seen.layout.visual[:, None] & (torch.arange(keys, device=rows.device) <= rows[..., None])  # [B,A,K]
        query = seen.q.gather(2, _rows_of(rows - (keys - seen.q.shape[2]), seen.q))  # [B,H,A,D]
        value = seen.v.gather(2, _rows_of(rows, seen.v))
        key = seen.k.repeat_interleave(query.shape[1] // seen.k.shape[1], 1)
        scale = seen.common.get("scale") or key.shape[3] ** -0.5
        by_row = sum(scores.visible_shares(of, other, scale, visible) for of, other in ((query, key), (value, seen.v)))
        asked = (rows >= 0) & visible.any(2)
        mean = (by_row * asked[..., None]).sum(1) / asked.sum(1, keepdim=True).clamp_min(1)  # type: ignore[operator]
        return mean * scores.value_strength(seen.v).masked_fill(~seen.layout.visual, 0)


def _rows_of(place: Int[Tensor, "batch asks"], x: Tensor) -> Tensor:
    return place.clamp_min(0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


# In a vision encoder. Layers are blocks; values are given for patches only.


@dataclass(frozen=True)
class PatchAttention(Signal):
    """Attention that each patch gets in a block: [images, heads, patches].

    who: ``"class"``, from the class token (softmax over all tokens, the class token among them); ``"all"``, from every
    token (mean); ``"mean"``, from the mean query of all tokens.
    """

    who: Literal["class", "all", "mean"] = "class"
    part: ClassVar[Literal["language", "vision"]] = "vision"
    axis: ClassVar[int] = 2

    def read(self, seen: Attention) -> Tensor:
        memo = {} if seen.memo is None else seen.memo
        if self.who not in memo:
            memo[self.who] = self._read(seen)
        return memo[self.who]

    def _read(self, seen: Attention) -> Tensor:
        count = seen.valid.sum(1)
        if self.who == "class":
            got = scores.first_row(seen.q, seen.k, **seen.common)
        elif self.who == "all":
            rows = torch.where(seen.valid, torch.arange(seen.valid.shape[1], device=count.device), -1)
            got = seen.received(rows) / count[:, None, None]
        else:
            q = seen.q.masked_fill(~seen.valid[:, None, :, None], 0).sum(2, keepdim=True) / count[:, None, None, None]
            got = seen._replace(q=q).received(torch.full_like(count, seen.k.shape[2] - 1)[:, None])
        return got[..., seen.prefix :]


@dataclass(frozen=True)
class PatchKeys(Signal):
    """Keys of the patches in a block: [images, heads, patches, dim]."""

    part: ClassVar[Literal["language", "vision"]] = "vision"
    axis: ClassVar[int] = 2

    def read(self, seen: Attention) -> Tensor:
        return seen.k[:, :, seen.prefix :]


@dataclass(frozen=True)
class OneHeadClassRow(Signal):
    """The class token's attention to the patches when all heads are taken as one of full width: [images, patches]."""

    part: ClassVar[Literal["language", "vision"]] = "vision"

    def read(self, seen: Attention) -> Tensor:
        q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (seen.q, seen.k))  # [N,1,T,C]
        common: Common = {**seen.common, "scale": q.shape[3] ** -0.5}  # type: ignore[typeddict-item]
        one = seen._replace(q=q, k=k, common=common)
        return one.received(torch.zeros_like(seen.valid[:, :1], dtype=torch.long))[:, 0, seen.prefix :]


@dataclass(frozen=True)
class PatchFlow(Signal):
    """FlowCut's score of a block, [images, patches]: see :func:`~vlm.models.program.scores.flow`.

    class_token: False is its form for encoders without one: attention from the mean query times the value's strength.
    similarity: of values, ``"softmax"`` of their products (official code) or ``"cosine"`` (paper; negative ones count
    as none).
    """

    class_token: bool = True
    similarity: Literal["softmax", "cosine"] = "softmax"
    part: ClassVar[Literal["language", "vision"]] = "vision"

    def read(self, seen: Attention) -> Tensor:
        attention = PatchAttention(self.layer, "class" if self.class_token else "mean").read(seen).mean(1)
        valid, value = seen.valid[:, seen.prefix :], seen.v[:, :, seen.prefix :]
        if not self.class_token:
            return attention * scores.value_strength(value).masked_fill(~valid, 0)
        if self.similarity == "cosine":
            alike = (unit(seen.v[:, :, :1]) * unit(value)).sum(-1).clamp_min(0).mean(1)
        else:
            alike = scores.value_similarity(seen.v[:, :, 0], value, valid)
        return scores.flow(attention, alike, scores.value_strength(value), valid)


class Vision(NamedTuple):
    """What a method may know of the vision encoder.

    depth: its blocks as published; a negative layer counts from there. blocks: how many of them run. output: the block
    whose features are handed over. class_token: whether the first token is one. cuts: why tokens cannot go between
    blocks, empty when they can. attention: why attention cannot be read, empty when it can. width: of a patch's
    features. kind: the ``model_type`` of an encoder of Transformers.
    """

    depth: int
    blocks: int
    output: int
    class_token: bool
    cuts: str = ""
    attention: str = ""
    width: int = 0
    kind: str = ""

    def block(self, layer: int | None, who: str) -> int:
        """The block that ``layer`` means: counted from 0, from the end when negative, the output's when None.

        Raises ModelError when it does not run or its attention cannot be read.
        """
        if self.attention:
            raise ModelError(f"{who}: it reads attention in the vision encoder, but {self.attention}")
        number = self.output if layer is None else layer + self.depth if layer < 0 else layer
        if not 0 <= number < self.blocks:
            raise ModelError(f"{who}: expected a block of the vision encoder, 0..{self.blocks - 1}; found {number}")
        return number


class Facts(NamedTuple):
    """What a method may know of the model it acts on.

    layers, width: of the language model. refuses: what a program may not do to it and why, by the name of a site
    (``"vit.out"``), of an op (``"Regroup"``) or of a position policy (``"reindex"``). vision: None where Transformers
    encodes and projects in one step. visual: visual tokens of an image, None where that depends on the image. shape:
    what cost depends on. tokenize: the token ids of a text, decode: the text of token ids, where the tokenizer is
    known. companion: another model of the same batches, by name or folder, where one can be loaded. shelf: where
    calibrations lie (:class:`~vlm.models.program.artifact.Shelf`).
    """

    layers: int
    width: int
    refuses: Mapping[str, str] = {}
    vision: Vision | None = None
    visual: int | None = None
    shape: DecoderShape | None = None
    tokenize: Callable[[str], Sequence[int]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    companion: Callable[[str], Any] | None = None
    shelf: Any = None


def encoder_of(facts: Facts, who: str) -> Vision:
    """The vision encoder's facts. Raises ModelError where programs cannot see the encoder."""
    if facts.vision is None:
        raise ModelError(f"{who}: {facts.refuses.get('vit.out', 'it needs a vision encoder that programs can see')}")
    return facts.vision


def class_token_of(facts: Facts, who: str, instead: str = "") -> Vision:
    """The vision encoder's facts. Raises ModelError for an encoder without a class token; ``instead``: the way out."""
    vision = encoder_of(facts, who)
    if not vision.class_token:
        why = "it ranks tokens by the class token's attention, and this vision encoder has no class token"
        raise ModelError(f"{who}: {why}" + (f"; {instead}" if instead else ""))
    return vision


def patch_attention(facts: Facts, who: str, layer: int | None, attention: Literal["class", "received"]) -> Signal:
    """The attention by which a method ranks patches: from the class token, or received from all tokens.

    Raises ModelError for an encoder without a class token, naming the way out.
    """
    of_class = attention == "class"
    vision = class_token_of(facts, who, "set attention: received") if of_class else encoder_of(facts, who)
    return PatchAttention(vision.block(layer, who), "class" if of_class else "all")
