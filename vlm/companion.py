"""A second model beside a recipe's own that takes the same batches: the guide of a pruner."""

from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.pretrained import PretrainedVlm, load_pretrained
from vlm.models.processing import load_processor
from vlm.models.saved import load_composed
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Recipe

# What an image processor's settings say besides what it does.
_NAMES = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "_processor_class")


def companion(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, meta: bool, model: BaseVlm, name: str
) -> BaseVlm:
    """The model at ``name``, loaded once: a checkpoint's family beside a checkpoint, what ``vlm export`` wrote beside a
    composed model. On the meta device for planning.

    Raises ModelError when there is none, or when tokens or pixels made for ``model`` mean something else to it.
    """
    half = recipe.run.precision == "bf16" and recipe.model.origin is not None
    dtype = torch.bfloat16 if half else torch.float32
    try:
        if recipe.model.origin is not None:
            guide: Any = _checkpoint(name, meta, dtype)
            _check_checkpoint(recipe.model.origin.name, model, guide, name)
        else:
            guide, words = _composed(name, dtype)
            _check_composed(tokenizer, words, model, guide)
    except ModelError as error:
        raise ModelError(f"guide {name}: {error}") from None
    return guide


@lru_cache(maxsize=2)
def _checkpoint(name: str, meta: bool, dtype: torch.dtype) -> PretrainedVlm:
    guide = load_pretrained(name, meta=meta)
    _freeze(guide, dtype)
    return guide


@lru_cache(maxsize=2)
def _composed(name: str, dtype: torch.dtype) -> tuple[VisionLanguageModel, PreTrainedTokenizerBase | None]:
    saved = load_composed(name)
    _freeze(saved.model, dtype)
    return saved.model, saved.tokenizer


def _freeze(guide: BaseVlm, dtype: torch.dtype) -> None:
    """Weights alone: buffers such as the frequencies of rotary positions must stay exact."""
    for parameter in guide.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)


def _check_checkpoint(own: str, model: Any, guide: PretrainedVlm, name: str) -> None:
    if type(guide.family) is not type(model.family):
        expected, found = model.model.config.model_type, guide.model.config.model_type
        raise ModelError(f"expected a model of the same family as {expected}; found {found}")
    ours, theirs = load_processor(own), load_processor(name)
    _check_words(ours.tokenizer, theirs.tokenizer)
    if guide.family.image_token != model.family.image_token:
        found = guide.family.image_token
        raise ModelError(f"expected the image token {model.family.image_token}; found {found}")
    settings = [{k: v for k, v in p.image_processor.to_dict().items() if k not in _NAMES} for p in (ours, theirs)]
    for key in sorted(settings[0].keys() | settings[1].keys()):
        expected, found = (one.get(key) for one in settings)
        if expected != found:
            raise ModelError(f"expected the model's image processor, {key} {expected}; found {found}")


def _check_composed(tokenizer: Any, words: Any, model: Any, guide: VisionLanguageModel) -> None:
    if words is None:
        raise ModelError("expected a tokenizer in the folder, to compare with the model's; found none")
    _check_words(tokenizer, words)
    for what, expected, found in (
        ("pixels", model.vision.image, guide.vision.image),
        ("tiles of an image", model.max_tiles, guide.max_tiles),
        ("newlines", model.newline is not None, guide.newline is not None),
        ("most patches of a picture that keeps its shape", model.max_patches, guide.max_patches),
        ("grid of visual tokens", model.visual_grid, guide.visual_grid),
    ):
        if expected != found:
            raise ModelError(f"expected the model's {what}, {expected}; found {found}")


def _check_words(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Refuse a guide to which the same ids are other words."""
    expected, found = ours.get_vocab(), theirs.get_vocab()
    if expected == found:
        return
    word = min(
        (word for word in expected.keys() | found.keys() if expected.get(word) != found.get(word)),
        key=lambda word: expected.get(word, len(expected)),
    )
    raise ModelError(
        f"expected the model's tokenizer, in which {word!r} is {expected.get(word)}; found {found.get(word)}"
    )
