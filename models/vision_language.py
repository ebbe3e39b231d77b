"""The composed vision-language model: encode, prune, project, splice, decode, loss."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.models.base import BaseVlm, pixel_seed
from vlm.models.program.layout import Side, compact
from vlm.models.program.run import Run
from vlm.models.program.signals import Vision
from vlm.models.splice import IMAGE_TOKEN, Visual, check_placeholders, splice


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

    def without_images(self) -> "Inputs":
        """The same prompts with their images removed, placeholders included."""
        index, valid = compact(self.valid & (self.tokens != IMAGE_TOKEN), "right")
        tokens = self.tokens.gather(1, index).masked_fill(~valid, 0)
        return Inputs(tokens, valid, self.images[:0], self.owner[:0], self.keys)


class VisionLanguageModel(BaseVlm):
    """A vision encoder, a connector and a causal language model.

    Parts are named as in a recipe: ``vision``, ``connector``, ``language``.
    """

    # Any: nn.Module's attribute types hide what Encoder and the connectors promise.
    vision: Any
    connector: Any

    def __init__(self, vision: nn.Module, connector: nn.Module, language: PreTrainedModel) -> None:
        super().__init__()
        self.vision, self.connector, self.language = vision, connector, language
        self.visual_grid: tuple[int, int] = self.connector.grid(*self.vision.grid)

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.language.get_decoder()

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image before any cut."""
        return self.visual_grid[0] * self.visual_grid[1]

    def visual_counts(self, inputs: Inputs) -> Int[Tensor, " batch"]:
        return self.visual_tokens * torch.bincount(inputs.owner, minlength=len(inputs.tokens))

    @property
    def refuses(self) -> Mapping[str, str]:
        if self.visual_grid == self.vision.grid:
            return {}
        why = f"the connector folds {self.vision.grid} to {self.visual_grid}; prune at llm.in instead"
        return dict.fromkeys(("vit.mid", "vit.after", "vit.out"), why)

    @property
    def vision_facts(self) -> Vision:
        encoder = self.vision
        blind = "" if encoder.blocks else f"{type(encoder).__name__} has no attention blocks"
        return Vision(encoder.depth, len(encoder.blocks), encoder.output, encoder.class_token, encoder.cuts, blind)

    def encode(self, inputs: Inputs) -> Visual:
        """Encode, prune and project the images of a batch."""
        engine = None if self.engine is None else self.engine.vision
        if engine is None or not engine.acts:
            found = self.vision(inputs.images)  # tokens [N,P,V]
            return Visual(self.connector(found.tokens, found.grid), self.visual_grid, inputs.owner)
        engine.begin(len(inputs.images), pixel_seed(inputs.images))
        found = self.vision(inputs.images)
        cut = engine.finish(found.tokens)
        if cut is None:
            return Visual(self.connector(found.tokens, found.grid), self.visual_grid, inputs.owner)
        features = cut.features.to(found.tokens.dtype)
        projected = self.connector(features, found.grid)
        return Visual(projected, self.visual_grid, inputs.owner, cut.place, cut.valid, engine.position == "keep")

    def _enter(self, inputs: Inputs, side: Side | None) -> tuple[Tensor, Run]:
        side = side or "right"
        check_placeholders(inputs.tokens, inputs.valid, inputs.owner, inputs.keys)
        embedded = self.language.get_input_embeddings()(inputs.tokens.clamp_min(0))
        if len(inputs.images):
            visual = self.encode(inputs)
        else:
            visual, embedded = self._without_images(inputs, embedded)
        embeds, layout = splice(inputs.tokens, inputs.valid, embedded, visual, side)
        run = Run(layout, side, pixel_seed(inputs.images))
        run.total = self.visual_counts(inputs)  # an encoder may have cut some already
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

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        """The language model's head, with the scaling or soft cap that its config asks for."""
        config: Any = self.language.config
        head: Any = self.language.get_output_embeddings()
        logits = head(hidden)
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
