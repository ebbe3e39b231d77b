"""Relevance of an image's patches to the question, by the text tower that a CLIP vision encoder was trained with."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from vlm.models.errors import ModelError
from vlm.models.program.scores import text_likeness
from vlm.models.program.signals import Facts, Given, encoder_of


def clip_relevance(facts: Facts, name: str, who: str) -> Given:
    """Minus the mean cosine of each visual token's patch with the question in CLIP's common space, as a signal.

    name: hub name or folder of the CLIP whose vision encoder the model has. Its weights are read at the first pass. The
    encoder runs once more for it, before the pass. A newline is as little relevant as the least relevant patch of its
    sample. The sign is the paper's: CLIP's patches are inverted. Source: CDPruner (NeurIPS 2025), section 3.2.

    Raises ModelError where there is no such CLIP, or no patch stands behind each visual token.
    """
    if why := facts.refuses.get("vit.out") or facts.refuses.get("patch_features"):
        why = why.partition(";")[0]
        raise ModelError(
            f"{who}: relevance: expected a patch behind each visual token; {why}; use relevance: language instead"
        )
    vision = encoder_of(facts, who)
    if vision.kind not in ("", "clip_vision_model"):
        raise ModelError(
            f"{who}: relevance: clip: expected a vision encoder of CLIP, of model_type clip_vision_model; "
            f"found {vision.kind!r}; use relevance: language instead"
        )
    if facts.decode is None:
        raise ModelError(f"{who}: relevance: expected a model that was built with its tokenizer, to read the question")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{who}: text: no CLIP at {name!r}: {str(error).splitlines()[0]}") from None
    if config.model_type != "clip":
        raise ModelError(f"{who}: text: expected a whole CLIP, of model_type clip; found {config.model_type!r}")
    if (width := config.vision_config.hidden_size) != vision.width:
        raise ModelError(
            f"{who}: text: expected the CLIP of the model's own vision encoder, {vision.width} wide; "
            f"found {name!r}, {width} wide"
        )
    clip: list[_Clip] = []

    def scores(model: Any, inputs: Any, weights: Tensor | None) -> Float[Tensor, "batch visual"]:
        clip[:] = clip or [_Clip(name, who)]
        patches, real = model.patch_features(inputs)
        texts = [model.detokenize(ids) for ids in question_ids(inputs, weights)]
        return clip[0].to(patches.device)(patches, real, texts)

    return Given(scores=scores)


def question_ids(inputs: Any, weights: Float[Tensor, "batch length"] | None) -> list[list[int]]:
    """The text of each row after its last image, in training up to the first answer there; all the text that no answer
    is where there is none. Templates' words between them are part of it."""
    place = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
    visual = (inputs.visual if hasattr(inputs, "visual") else inputs.tokens < 0) & inputs.valid
    beyond = place > torch.where(visual, place, -1).amax(1, keepdim=True)
    learned = torch.zeros_like(visual) if weights is None else weights > 0
    text = inputs.valid & ~visual & ~learned
    asked = text & beyond & ((learned & beyond).cumsum(1) == 0)
    asked = torch.where(asked.any(1, keepdim=True), asked, text)
    return [row[mine].tolist() for row, mine in zip(inputs.tokens, asked, strict=True)]


class _Clip(nn.Module):
    """What of a CLIP gives its common space: the text tower, and the way of an encoder's patches there."""

    def __init__(self, name: str, who: str) -> None:
        super().__init__()
        try:
            model: Any = CLIPModel.from_pretrained(name, dtype=torch.float32)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(f"{who}: text: cannot load {name!r}: {str(error).splitlines()[0]}") from None
        self.text, self.text_projection = model.text_model, model.text_projection
        self.norm, self.projection = model.vision_model.post_layernorm, model.visual_projection
        self.longest: int = model.config.text_config.max_position_embeddings
        self.requires_grad_(False).eval()

    def forward(
        self, patches: Float[Tensor, "batch visual width"], real: Bool[Tensor, "batch visual"], texts: list[str]
    ) -> Float[Tensor, "batch visual"]:
        if not patches.shape[1]:
            return patches.new_zeros(real.shape)
        with torch.autocast(patches.device.type, enabled=False):  # of a training pass
            seen = self.projection(self.norm(patches.float()))
            said, there = self._texts(texts, patches.device)
            found = -text_likeness(seen, said, there)
        least = found.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        return torch.where(real, found, least).masked_fill(~real.any(1, keepdim=True), 0)

    def _texts(
        self, texts: list[str], device: torch.device
    ) -> tuple[Float[Tensor, "batch pieces width"], Bool[Tensor, "batch pieces"]]:
        """Embeddings of each text, in as many pieces as CLIP's context makes of it. (The released code cuts the longer
        ones without an end token in any but the last piece.)"""
        begin, end, most = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.longest - 2
        pieces, counts = [], []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            parts = [ids[at : at + most] for at in range(0, len(ids), most)] or [[]]
            pieces += [torch.tensor([begin, *part, end]) for part in parts]
            counts.append(len(parts))
        tokens = pad_sequence(pieces, batch_first=True, padding_value=end).to(device)
        mask = pad_sequence([torch.ones_like(piece) for piece in pieces], batch_first=True).to(device)
        found = self.text_projection(self.text(input_ids=tokens, attention_mask=mask).pooler_output)
        count = torch.tensor(counts, device=device)
        by_row = pad_sequence(found.split(counts), batch_first=True)
        return by_row, torch.arange(by_row.shape[1], device=device) < count[:, None]
