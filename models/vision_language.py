"""The composed vision-language model: encode, prune, project, splice, decode, loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vlm.models.errors import ModelError
from vlm.models.program.attach import Engine
from vlm.models.program.layout import Layout, Side, compact
from vlm.models.program.program import Decoder
from vlm.models.program.run import Run
from vlm.models.splice import Visual, check_placeholders, splice


class Inputs(NamedTuple):
    """A batch as the data layer makes it: rows of token ids, one placeholder (-1) per image.

    valid marks real tokens. Image i belongs to row owner[i]; its placeholder is the next one of that row in
    reading order. keys name the samples in error messages.
    """

    tokens: Int[Tensor, "batch length"]
    valid: Bool[Tensor, "batch length"]
    images: Float[Tensor, "images 3 height width"]
    owner: Int[Tensor, " images"]
    keys: Sequence[str] = ()


class Output(NamedTuple):
    """loss: sum over supervised tokens of weight times cross-entropy; weight: the sum of the weights.

    hidden and layout describe the sequence that left the decoder (shorter than what entered if it was cut).
    """

    loss: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    hidden: Float[Tensor, "batch length width"]
    layout: Layout


class Stream(NamedTuple):
    """One context of a decode: its key/value cache and what is known of its sequence."""

    cache: DynamicCache
    run: Run


class VisionLanguageModel(nn.Module):
    """A vision encoder, a connector and a causal language model.

    Parts are named as in a recipe: ``vision``, ``connector``, ``language``. Programs are attached with
    :func:`vlm.models.program.attach.attach`.
    """

    # Any: nn.Module's attribute types hide what Encoder and the connectors promise.
    vision: Any
    connector: Any

    def __init__(self, vision: nn.Module, connector: nn.Module, language: PreTrainedModel) -> None:
        super().__init__()
        self.vision, self.connector, self.language = vision, connector, language
        self.engine: Engine | None = None  # set by attach() for the time of its block
        self.visual_grid: tuple[int, int] = self.connector.grid(*self.vision.grid)

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.language.get_decoder()

    @property
    def decoder_facts(self) -> Decoder:
        config: Any = self.language.config
        return Decoder(config.num_hidden_layers, config.hidden_size)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image before any cut."""
        return self.visual_grid[0] * self.visual_grid[1]

    def forward(self, inputs: Inputs, weights: Float[Tensor, "batch length"] | None = None) -> Output:
        """One pass; ``weights[b, t]`` is the loss weight of predicting ``tokens[b, t]``, none by default."""
        embeds, run = self._enter(inputs, side="right")
        hidden = self._decode(embeds, run, None)
        loss, weight = self._loss(hidden, run.last, inputs.tokens, weights)
        return Output(loss, weight, hidden, run.last)

    def prefill(self, inputs: Inputs) -> tuple[Float[Tensor, "batch vocab"], Stream]:
        """Run prompts; returns the logits of the next token and the stream that :meth:`step` continues."""
        embeds, run = self._enter(inputs, side="left")  # left padding: every row ends at the last place
        cache = DynamicCache(config=self.language.config)
        hidden = self._decode(embeds, run, cache)
        return self.logits(hidden[:, -1]), Stream(cache, run)

    def step(self, stream: Stream, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Append one token to each row of ``stream``; returns the logits of the next token."""
        stream.run.append()
        embeds = self.language.get_input_embeddings()(tokens[:, None])
        return self.logits(self._decode(embeds, stream.run, stream.cache)[:, -1])

    def encode(self, inputs: Inputs) -> Visual:
        """Encode, prune at ``vit.out`` and project the images of a batch."""
        found = self.vision(inputs.images)  # tokens [N,P,V]
        if self.engine is None or self.engine.feature_cut is None:
            return Visual(self.connector(found.tokens, found.grid), self.visual_grid, inputs.owner)
        if self.visual_grid != found.grid:
            raise ModelError(
                f"vit.out: the connector folds {found.grid} to {self.visual_grid}; prune at llm.in instead"
            )
        kept = self.engine.choose_features(found.tokens, pixel_seed(inputs.images))
        if kept is None:
            return Visual(self.connector(found.tokens, found.grid), self.visual_grid, inputs.owner)
        index, valid = compact(kept, "right")  # [N,K]
        features = found.tokens.gather(1, index[..., None].expand(-1, -1, found.tokens.shape[2]))
        return Visual(self.connector(features, found.grid), self.visual_grid, inputs.owner, index, valid)

    def _enter(self, inputs: Inputs, side: Side) -> tuple[Tensor, Run]:
        check_placeholders(inputs.tokens, inputs.valid, inputs.owner, inputs.keys)
        embedded = self.language.get_input_embeddings()(inputs.tokens.clamp_min(0))
        if len(inputs.images):
            visual = self.encode(inputs)
        else:
            visual, embedded = self._without_images(inputs, embedded)
        embeds, layout = splice(inputs.tokens, inputs.valid, embedded, visual, side)
        run = Run(layout, side, pixel_seed(inputs.images))
        return (embeds if self.engine is None else self.engine.enter_language(embeds, run)), run

    def _without_images(self, inputs: Inputs, embedded: Tensor) -> tuple[Visual, Tensor]:
        """No image in the batch: in training the vision path runs all the same, on a blank image times zero.

        Otherwise its parameters would get no gradient here while another rank waits to reduce theirs.
        """
        empty = embedded.new_zeros(0, 1, embedded.shape[2])
        if self.training and any(p.requires_grad for m in (self.vision, self.connector) for p in m.parameters()):
            size = self.vision.image.size
            found = self.vision(embedded.new_zeros(1, 3, size, size))
            embedded = embedded + 0.0 * self.connector(found.tokens, found.grid).sum().to(embedded.dtype)
        return Visual(empty, self.visual_grid, inputs.owner), embedded

    def _decode(self, embeds: Tensor, run: Run, cache: DynamicCache | None) -> Float[Tensor, "batch rows width"]:
        layout = run.layouts[0]
        # The mask is always given: without one Transformers reads jumps of position ids as packed samples.
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=layout.valid.long(),
            position_ids=layout.position[:, -embeds.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
            **({} if self.engine is None else self.engine.tag(run)),
        ).last_hidden_state

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """The language model's head, with the scaling or soft cap that its config asks for."""
        config: Any = self.language.config
        head: Any = self.language.get_output_embeddings()
        logits = head(hidden)
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _loss(
        self, hidden: Tensor, layout: Layout, tokens: Tensor, weights: Tensor | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        zero = hidden.new_zeros((), dtype=torch.float32)
        if weights is None:
            return zero, zero
        # The place before a supervised token predicts it; only those places go through the head.
        text = layout.valid & ~layout.visual
        target = tokens.gather(1, layout.source)[:, 1:]
        weight = (weights.gather(1, layout.source) * text)[:, 1:].float()
        chosen = weight > 0
        if not bool(chosen.any()):
            return self.logits(hidden[:, :1]).float().sum() * 0.0, zero  # keeps every parameter in the graph
        logits = self.logits(hidden[:, :-1][chosen]).float()  # [supervised, vocab]
        each = nn.functional.cross_entropy(logits, target[chosen], reduction="none")
        return (each * weight[chosen]).sum(), weight.sum()


def pixel_seed(images: Float[Tensor, "images 3 height width"]) -> Int[Tensor, " images"]:
    """An integer of each image's pixels: exact, so the same image gives it in any batch."""
    bits = images.detach().float().contiguous().view(torch.int32).flatten(1).long()
    place = torch.arange(1, bits.shape[1] + 1, device=bits.device) % 8191
    return (bits * place).sum(1) % 2**40
