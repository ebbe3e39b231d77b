"""A composed model as a checkpoint of Transformers' LLaVA, which other programs load without us."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from vlm.models.backbones.huggingface import HuggingFace
from vlm.models.connectors.mlp import Mlp
from vlm.models.errors import ModelError
from vlm.models.lora import merged
from vlm.models.vision_language import VisionLanguageModel

IMAGE = "<image>"
_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def to_llava(model: VisionLanguageModel, image_token: int) -> LlavaForConditionalGeneration:
    """The same weights as a LLaVA model whose token ``image_token`` stands for each visual token.

    The vocabulary grows when the token is beyond it; logits of the tokens that were there are equal. Raises ModelError
    for parts that LLaVA does not have: it takes an encoder of Transformers, an MLP of two layers and a plain head.
    Adapters are merged.
    """
    model = merged(model)
    vision, connector, language = model.vision, model.connector, model.language
    text: Any = language.config
    plain = all(getattr(text, name, None) in (None, 1.0) for name in _SCALES)
    if not isinstance(vision, HuggingFace) or not isinstance(connector, Mlp) or not plain:
        found = f"{type(vision).__name__}, {type(connector).__name__}, {type(language).__name__}"
        raise ModelError(f"export: LLaVA takes HuggingFace, Mlp and a language model with a plain head; found {found}")
    linear = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    if len(linear) != 2 or connector.shuffle != 1:
        found = f"{len(linear)} layers, shuffle {connector.shuffle}"
        raise ModelError(f"export: LLaVA's connector has 2 layers and shuffle 1; found {found}")
    vocabulary = max(text.vocab_size, image_token + 1)
    config = LlavaConfig(
        vision_config=vision.model.config,
        text_config={**text.to_dict(), "vocab_size": vocabulary},
        image_token_index=image_token,
        vision_feature_layer=vision.layer,
        vision_feature_select_strategy="default" if _prefix(vision) else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    exported: Any = LlavaForConditionalGeneration(config)
    exported.to(next(language.parameters()).dtype)
    inner = exported.model
    inner.vision_tower.load_state_dict(vision.model.state_dict())
    inner.multi_modal_projector.linear_1.load_state_dict(linear[0].state_dict())
    inner.multi_modal_projector.linear_2.load_state_dict(linear[1].state_dict())
    decoder = language.get_decoder().state_dict()
    decoder["embed_tokens.weight"] = _grown(decoder["embed_tokens.weight"], vocabulary)
    inner.language_model.load_state_dict(decoder)
    head: Any = language.get_output_embeddings()
    with torch.no_grad():
        exported.lm_head.weight.copy_(_grown(head.weight, vocabulary))
    return exported.eval()


def save_llava(model: VisionLanguageModel, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a LLaVA checkpoint (safetensors, config, processor) that stock Transformers loads.

    The tokenizer in the folder has one token more, for images. Raises ModelError as :func:`to_llava`.
    """
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    number = tokenizer.convert_tokens_to_ids(IMAGE)
    to_llava(model, number).save_pretrained(folder)
    vision = model.vision
    side, mean, std, interpolation = vision.image
    images = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[*mean],
        image_std=[*std],
        resample=_RESAMPLE[interpolation],
    )
    prefix = _prefix(vision)
    kind = "default" if prefix else "full"
    patch = vision.model.config.patch_size
    LlavaProcessor(images, tokenizer, patch, kind, num_additional_image_tokens=prefix).save_pretrained(folder)


_SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping")


def _prefix(vision: HuggingFace) -> int:
    """How many tokens stand before the grid's: LLaVA drops one, so one or none."""
    side = vision.image.size
    found = vision(next(vision.parameters()).new_zeros(1, 3, side, side)).prefix
    count = 0 if found is None else found.shape[1]
    if count > 1:
        raise ModelError(f"export: LLaVA's encoder has at most one token before the grid; found {count}")
    return count


def _grown(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
