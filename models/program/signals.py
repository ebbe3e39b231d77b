"""Signals: the statistics that ops ask for. The engine reads each once, where it arises, and takes it along every cut.

A signal names its layer and says how it is read: from one attention call (:class:`Attention`) or from the state that
enters a layer. A new statistic is one class here. Signals carry no gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.received import received_attention
from vlm.kernels.visibility import Common
from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout, compact
from vlm.models.program.scores import flow, value_similarity, value_strength
from vlm.models.program.shape import DecoderShape

Rows = Literal["last", "text", "all"] | int
Heads = Literal["mean", "each"]


class Attention(NamedTuple):
    """One attention call: queries of its last rows, all keys and values, and what stands where.

    layout: of the keys; None in a vision encoder. valid: which keys are real. prefix: keys before an encoder's patches
    (class token, registers). asks: keys whose rows ask for what follows, -1 where unused (see :class:`Received`).
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

    def received(
        self,
        rows: Int[Tensor, "batch chosen"],
        weight: Float[Tensor, "batch chosen"] | None = None,
        reduce: str = "sum",
    ) -> Float[Tensor, "batch heads keys"]:
        """What each key gets from the rows of the given keys (-1: unused)."""
        rows = torch.where(rows >= 0, rows - (self.k.shape[2] - self.q.shape[2]), -1)
        return received_attention(
            self.q, self.k, None, rows, row_weight=weight, reduce=reduce, impl=self.impl, **self.common
        )

    def places(self, rows: Rows) -> Int[Tensor, "batch chosen"]:
        """The keys whose rows are meant by ``rows``, -1 where unused."""
        if rows == "last" and self.asks is not None:
            return self.asks
        number = self.valid.long().cumsum(1)
        wanted = self.valid
        if rows == "text" and self.layout is not None:
            place = torch.arange(wanted.shape[1], device=wanted.device)
            wanted = wanted & (place > self.layout.last(self.layout.visual)[:, None])
        elif rows != "all":
            wanted = wanted & (number > number[:, -1:] - (1 if rows == "last" else int(rows)))
        wanted = wanted.clone()
        wanted[:, : self.k.shape[2] - self.q.shape[2]] = False  # rows of this call only
        index, real = compact(wanted, "right")
        return index.masked_fill(~real, -1)


@dataclass(frozen=True)
class Signal:
    """A statistic of ``layer``. axis: where its keys (in an encoder: its patches) lie.

    part: which half of the model it is read in. of_state: it is read from the state that enters the layer, before a
    cut there; otherwise from the layer's attention. ahead: read from what the layer's attention would be at its input,
    so that a cut there can ask for it.
    """

    layer: int
    part: ClassVar[Literal["language", "vision"]] = "language"
    of_state: ClassVar[bool] = False
    axis: ClassVar[int] = 1

    @property
    def ahead_of_layer(self) -> bool:
        return False

    @property
    def key_axis(self) -> int:
        return self.axis

    def read(self, seen: Attention) -> Tensor:
        raise NotImplementedError

    def read_state(self, hidden: Tensor, decoder: Any) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Received(Signal):
    """Attention that each key gets from some rows: [batch, keys], or [batch, heads, keys] with ``heads="each"``.

    rows: ``"last"``, the rows that ask for what follows: a prompt's last token; in training the token before each
    answer (mean over answers). ``"text"``, all rows after the last image; ``"all"``; or a number, so many last rows.
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
        index = (seen.places(self.rows) - (seen.k.shape[2] - seen.q.shape[2])).clamp_min(0)
        return seen.q.gather(2, index[:, None, :, None].expand(-1, seen.q.shape[1], -1, seen.q.shape[3]))


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
        count = seen.valid.sum(1)
        if self.who == "class":
            got = seen.received(torch.zeros_like(count)[:, None])
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
    """

    class_token: bool = True
    part: ClassVar[Literal["language", "vision"]] = "vision"

    def read(self, seen: Attention) -> Tensor:
        attention = PatchAttention(self.layer, "class" if self.class_token else "mean").read(seen).mean(1)
        valid, value = seen.valid[:, seen.prefix :], seen.v[:, :, seen.prefix :]
        if not self.class_token:
            return attention * value_strength(value).masked_fill(~valid, 0)
        similarity = value_similarity(seen.v[:, :, 0], value, valid)
        return flow(attention, similarity, value_strength(value), valid)


class Vision(NamedTuple):
    """What a method may know of the vision encoder.

    depth: its blocks as published; a negative layer counts from there. blocks: how many of them run. output: the block
    whose features are handed over. class_token: whether the first token is one. cuts: why tokens cannot go between
    blocks, empty when they can. attention: why attention cannot be read, empty when it can.
    """

    depth: int
    blocks: int
    output: int
    class_token: bool
    cuts: str = ""
    attention: str = ""

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
    what cost depends on.
    """

    layers: int
    width: int
    refuses: Mapping[str, str] = {}
    vision: Vision | None = None
    visual: int | None = None
    shape: DecoderShape | None = None


def encoder_of(facts: Facts, who: str) -> Vision:
    """The vision encoder's facts. Raises ModelError where programs cannot see the encoder."""
    if facts.vision is None:
        raise ModelError(f"{who}: {facts.refuses.get('vit.out', 'it needs a vision encoder that programs can see')}")
    return facts.vision


def patch_attention(facts: Facts, who: str, layer: int | None, attention: Literal["class", "received"]) -> Signal:
    """The attention by which a method ranks patches: from the class token, or received from all tokens.

    Raises ModelError for an encoder without a class token, naming the way out.
    """
    vision = encoder_of(facts, who)
    if attention == "class" and not vision.class_token:
        raise ModelError(
            f"{who}: it ranks tokens by the class token's attention, and this vision encoder has no class token; "
            "set attention: received"
        )
    return PatchAttention(vision.block(layer, who), "class" if attention == "class" else "all")


Reader = Callable[[Signal], Tensor]
