"""What every vision-language model here has in common: its passes, however images became tokens."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from vlm.models.errors import ModelError
from vlm.models.loss import summed_loss
from vlm.models.pack import LENGTHS, check_packs, lengths_of, no_mask, pack_mask, pack_rows
from vlm.models.program.artifact import Shelf
from vlm.models.program.attach import Engine
from vlm.models.program.layout import Layout, Side, compact
from vlm.models.program.perturb import pixel_seed as pixel_seed
from vlm.models.program.run import Run
from vlm.models.program.shape import DecoderShape
from vlm.models.program.signals import Facts, Vision
from vlm.models.roles import ROLES, Role, split


class Output(NamedTuple):
    """loss: sum over supervised tokens of weight times cross-entropy; weight: the sum of the weights.

    hidden and layout describe the sequence that left the decoder (shorter than what entered if it was cut).
    """

    loss: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    hidden: Float[Tensor, "batch length width"]
    layout: Layout


class Supervised(NamedTuple):
    """What a pass predicts where it is supervised, row after row and place after place.

    logits: of the token that stands there, float32. target: that token. weight: its loss weight. row, place: where it
    stands in the batch's ``tokens``.
    """

    logits: Float[Tensor, "supervised vocab"]
    target: Int[Tensor, " supervised"]
    weight: Float[Tensor, " supervised"]
    row: Int[Tensor, " supervised"]
    place: Int[Tensor, " supervised"]


class Stream(NamedTuple):
    """One context of a decode: its key/value cache and what is known of its sequence."""

    cache: DynamicCache
    run: Run

    def take_rows(self, index: Int[Tensor, " rows"]) -> "Stream":
        """The stream of a batch whose row i is row ``index[i]`` of this one, which stays as it is."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in cache.layers]
        cache.reorder_cache(index)  # type: ignore[arg-type]
        return Stream(cache, self.run.take_rows(index))

    def truncate(self, count: int) -> None:
        """Take back the last ``count`` generated tokens: caches, layouts, masks.

        Raises ModelError where a cache cannot be shortened (a full sliding window, a recurrent state, a cache policy
        that acts at generated tokens).
        """
        if count == 0:
            return
        self.run.truncate(count)
        for layer in self.cache.layers:
            try:
                layer.crop(-count)  # type: ignore[attr-defined]
            except (AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ModelError(f"decode: {type(layer).__name__} cannot be taken back: {reason}") from None


class Overview(NamedTuple):
    """Where the layout of a sample shows its first image whole: the tokens of ``image`` (its number in the batch) from
    ``row`` on, ``rows`` x ``cols`` of them."""

    image: int
    row: int
    rows: int
    cols: int

    def places(self, layout: Layout, sample: int) -> tuple[Bool[Tensor, " length"], Int[Tensor, " length"]]:
        """Which tokens of the sample belong to it, and which place of its grid each is; 0 elsewhere."""
        row, col = layout.row[sample] - self.row, layout.col[sample]
        shown = layout.visual[sample] & (layout.image[sample] == self.image)
        shown = shown & (row >= 0) & (row < self.rows) & (col < self.cols)
        return shown, (row * self.cols + col).masked_fill(~shown, 0)


class BaseVlm(nn.Module):
    """Images and text in, next-token logits out. Programs are attached with
    :func:`vlm.models.program.attach.attach`.

    A subclass says how a batch becomes embeddings and a layout (``_enter``), which part is the language model
    (``language``, ``decoder``) and its head (``logits``).
    """

    engine: Engine | None  # set by attach() for the time of its block

    def __init__(self) -> None:
        super().__init__()
        self.engine = None
        self.closing: Callable[[], Sequence[int]] | None = None  # the tokens with which a template ends every prompt
        # For methods that bring words of their own, read the prompt's, or ask a second model.
        self.tokenize: Callable[[str], Sequence[int]] | None = None
        self.detokenize: Callable[[Sequence[int]], str] | None = None
        self.companion: Callable[[BaseVlm, str], BaseVlm] | None = None
        self.shelf: Shelf | None = None

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        raise NotImplementedError

    @property
    def head(self) -> Any:
        """The module that makes logits of hidden states."""
        raise NotImplementedError

    @property
    def places(self) -> Mapping[str, Sequence[str]]:
        """Where the modules and lone parameters of each role lie: ``vision``, ``connector``, ``language``."""
        return {role: (role,) for role in ROLES}

    @property
    def idle(self) -> Sequence[str]:
        """Where weights lie that never train: those that no pass reads, such as encoder blocks after the one whose
        features are taken, and those of an encoder that is frozen by construction."""
        return ()

    @property
    def parts(self) -> Mapping[str, Role]:
        """What plays each role, for whoever trains, freezes or adapts it."""
        return split(self, self.places, self.idle)

    @property
    def refuses(self) -> Mapping[str, str]:
        """What no program may do to this model, and why; see :class:`~vlm.models.program.signals.Facts`."""
        return {}

    @property
    def facts(self) -> Facts:
        config: Any = self.decoder.config
        heads = config.num_attention_heads
        shape = DecoderShape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp=config.intermediate_size,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            itemsize=next(self.parameters()).itemsize,
        )
        known = (self.refuses, self.vision_facts, self.visual_tokens, shape, self.tokenize, self.detokenize)
        companion = None if self.companion is None else partial(self.companion, self)
        return Facts(shape.layers, shape.width, *known, companion, self.shelf)

    @property
    def visual_tokens(self) -> int | None:
        """Visual tokens of an image before any cut; None where that depends on the image."""
        return None

    @property
    def most_visual_tokens(self) -> int | None:
        """The most visual tokens that an image may have before any cut; None where there is no bound."""
        return self.visual_tokens

    @property
    def vision_facts(self) -> Vision | None:
        """What methods may know of the vision encoder; None where programs cannot see it."""
        return None

    def overview(self, layout: Layout, sample: int) -> Overview | None:
        """Where an uncut layout shows the first image of a sample whole; None for a sample without images."""
        raise NotImplementedError

    def visual_counts(self, inputs: Any) -> Int[Tensor, " batch"]:
        """Visual tokens of each row before any cut."""
        raise NotImplementedError

    def patch_features(self, inputs: Any) -> tuple[Float[Tensor, "batch visual width"], Bool[Tensor, "batch visual"]]:
        """What the encoder hands to the connector for each visual token of each row, in order and before any cut,
        padded on the right; and behind which of them there is a patch. Raises ModelError where that cannot be said."""
        raise ModelError(f"{type(self).__name__}: expected a connector that works token by token")

    def picture_share(self, inputs: Any) -> Float[Tensor, "batch visual"]:
        """How much of each visual token's patch shows the picture and not what it was padded with, before any cut: of
        each row, in order, padded on the right. Raises ModelError where that cannot be said."""
        raise ModelError(self._unpadded)

    @property
    def _unpadded(self) -> str:
        return (
            "padding: expected a composed model, whose pictures are padded here, and visual tokens that stand for "
            f"places; found {type(self).__name__}"
        )

    def forward(self, inputs: Any, weights: Float[Tensor, "batch length"] | None = None) -> Output:
        """One pass; ``weights[b, t]`` is the loss weight of predicting ``tokens[b, t]``, none by default."""
        hidden, layout = self._pass(inputs, weights)
        loss, weight = self._loss(hidden, layout, inputs.tokens, weights)
        return Output(loss, weight, hidden, layout)

    def supervised(self, inputs: Any, weights: Float[Tensor, "batch length"]) -> Supervised:
        """One pass as :meth:`forward` makes it, for objectives that want more of it than the sum of a loss."""
        hidden, layout = self._pass(inputs, weights)
        return self._supervised(hidden, layout, inputs.tokens, weights)

    def _pass(self, inputs: Any, weights: Tensor | None) -> tuple[Float[Tensor, "batch spliced width"], Layout]:
        """Hidden states of a pass over whole sequences, and the layout of what left the decoder."""
        asks = None if weights is None else _asks(weights)
        pack, inputs = inputs.pack, inputs._replace(pack=None)
        if self.engine is not None:
            self.engine.begin(self, inputs, weights, asks)
        embeds, run = self._enter(inputs, side=None)
        run.asks = asks
        if pack is not None:
            embeds = self._pack(embeds, run, pack)
        return self._decode(embeds, run, None), run.last

    def prefill(self, inputs: Any, stream: str = "main") -> tuple[Float[Tensor, "batch vocab"], Stream]:
        """Run prompts; returns the logits of the next token and the stream that :meth:`step` continues.

        ``stream`` names the context that the prompts are.
        """
        if self.engine is not None:
            self.engine.begin(self, inputs, None, None)
        embeds, run = self._enter(inputs, side="left")  # left padding: every row ends at the last place
        run.stream = stream
        cache = DynamicCache(config=self.decoder.config)
        hidden = self._decode(embeds, run, cache)
        if self.engine is not None:
            self.engine.close_pass(run, cache)
        return self.logits(hidden[:, -1]), Stream(cache, run)

    def step(self, stream: Stream, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append one token to each row of ``stream``; returns the logits of the next token."""
        stream.run.append()
        embeds = self.decoder.get_input_embeddings()(tokens[:, None])
        hidden = self._decode(embeds, stream.run, stream.cache)
        if self.engine is not None:
            self.engine.close_pass(stream.run, stream.cache)
        return self.logits(hidden[:, -1])

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """The language model's head."""
        raise NotImplementedError

    def map_pixels(self, inputs: Any, change: Callable[[Tensor, int], Tensor]) -> Any:
        """``inputs`` with every picture changed: ``change(pixels, number)``, normalised pixels as the encoder takes
        them. Raises ModelError for a model whose pixels are no pictures."""
        raise NotImplementedError

    def _enter(self, inputs: Any, side: Side | None) -> tuple[Tensor, Run]:
        """Embeddings [batch, length, width] of a batch and the run that begins, rows padded on ``side``.

        Without a side, rows stay padded as they come. The cut at ``llm.in`` is made here.
        """
        raise NotImplementedError

    def _pack(self, embeds: Tensor, run: Run, pack: Int[Tensor, " batch"]) -> Tensor:
        """The rows of a batch as packs. Raises ModelError for a decoder or a program that cannot take them."""
        if self.engine is not None and self.engine.tag(run):
            raise ModelError(
                "pack: a program that acts inside the language model reads one sample per row; train without pack, or "
                "prune before it (vit.out, llm.in)"
            )
        check_packs(self.decoder)
        embeds, run.layouts[0] = pack_rows(embeds, run.layouts[0], pack)
        run.packed, run.lengths = True, lengths_of(run.layouts[0], self.decoder.config)
        return embeds

    def _decode(self, embeds: Tensor, run: Run, cache: DynamicCache | None) -> Float[Tensor, "batch rows width"]:
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=self._mask(embeds, run, cache),
            position_ids=run.layouts[0].position_ids(embeds.shape[1]),
            past_key_values=cache,
            use_cache=cache is not None,
            **self._tag(run),
        ).last_hidden_state

    def _tag(self, run: Run) -> dict[str, Any]:
        """Keyword arguments that travel with the pass, through the decoder's layers to what acts in them."""
        if run.lengths is not None:
            return {LENGTHS: run.lengths}  # nothing acts inside
        return {} if self.engine is None else self.engine.tag(run)

    def _mask(self, embeds: Tensor, run: Run, cache: DynamicCache | None) -> Any:
        """What the decoder takes as its attention mask. Always given: without one Transformers reads jumps of
        position ids as packed samples."""
        if run.packed:
            layout, config = run.layouts[0], self.decoder.config
            return pack_mask(layout, config, embeds) if run.lengths is None else no_mask(layout)
        if 0 in run.held:  # each layer gets its own
            return torch.ones(len(embeds), run.held[0].place.shape[2], dtype=torch.long, device=embeds.device)
        return run.layouts[0].valid.long()

    def _loss(
        self, hidden: Tensor, layout: Layout, tokens: Tensor, weights: Tensor | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        zero = hidden.new_zeros((), dtype=torch.float32)
        if weights is None:
            return zero, zero
        chosen, weight, row, place = _supervised_places(layout, weights)
        if not len(row):
            return self.logits(hidden[:, :1]).float().sum() * 0.0, zero  # keeps every parameter in the graph
        config: Any = self.decoder.config
        head = self.head if all(getattr(config, name, None) in (None, 1.0) for name in _SCALES) else None
        rows, target = hidden[:, :-1][chosen], tokens[row, place]
        total = summed_loss(rows, target, weight, self.logits, config.vocab_size, head)
        return total.float(), weight.sum()

    def _supervised(self, hidden: Tensor, layout: Layout, tokens: Tensor, weights: Tensor) -> Supervised:
        chosen, weight, row, place = _supervised_places(layout, weights)
        logits = self.logits(hidden[:, :-1][chosen]).float()
        return Supervised(logits, tokens[row, place], weight, row, place)


# What models do to their logits after the head.
_SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping")


def _supervised_places(layout: Layout, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which places of a sequence but its last predict a supervised token; that token's weight, and its row and place in
    the batch's ``tokens``. Only those places go through the head."""
    text = layout.valid & ~layout.visual
    there = (layout.sample.clamp_min(0), layout.source)
    weight = (weights[there] * text)[:, 1:].float()
    weight = weight * (layout.sample[:, 1:] == layout.sample[:, :-1])  # the first of a sample follows another one
    chosen = weight > 0
    row, place = (where.expand(layout.source.shape)[:, 1:][chosen] for where in there)
    return chosen, weight[chosen], row, place


def _asks(weights: Float[Tensor, "batch length"]) -> Int[Tensor, "batch asks"]:
    """The places before each supervised span, -1 where unused: their rows ask for an answer."""
    supervised = weights > 0
    before = torch.nn.functional.pad(supervised[:, 1:] & ~supervised[:, :-1], (0, 1))
    index, real = compact(before, "right")
    return index.masked_fill(~real, -1)
