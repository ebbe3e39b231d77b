"""From a recipe to the objects it names: model, tokenizer, encoder of samples, data."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm.create import create
from vlm.data.chat import TEMPLATES, ChatEncoder
from vlm.data.images import ImageTransform
from vlm.models.language import build_language, load_language, load_tokenizer
from vlm.models.program.decode import Decoder
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.schema import Comparison


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names; that of its language model when it names none."""
    language = recipe.model.language
    name = language.tokenizer or language.name
    assert name is not None  # the schema asks for one of them
    return load_tokenizer(name)


def device() -> torch.device:
    """Where a model is evaluated: the first GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows; any will do for a tokenizer without one, because padding is never seen."""
    found = tokenizer.pad_token_id
    return found if isinstance(found, int) else 0


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, meta: bool = False) -> VisionLanguageModel:
    """The composed model with the recipe's seed; on the meta device (no memory, no weights) for planning."""
    torch.manual_seed(recipe.seed)
    with torch.device("meta") if meta else nullcontext():
        vision: Any = create("vision", recipe.model.vision)
        language = _language(recipe, tokenizer, meta)
        connector: Any = create(
            "connector", recipe.model.connector, vision_dim=vision.dim, language_dim=language.config.hidden_size
        )
        model = VisionLanguageModel(vision, connector, language, recipe.model.image.tiles)
    model.tokenize = partial(_token_ids, tokenizer)
    return model


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What a method's own words are for the model."""
    return tokenizer.encode(text, add_special_tokens=False)


def _language(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, meta: bool) -> Any:
    spec = recipe.model.language
    if spec.use == "config":
        return build_language(spec.config or {}, len(tokenizer))
    if meta:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(spec.name)), attn_implementation="sdpa")
    return load_language(str(spec.name))


def build_encoder(
    recipe: Recipe, model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, drop_image: float = 0.0
) -> ChatEncoder:
    """What turns a sample into token ids and pixels for this model."""
    image = model.vision.image
    size, seen = (image.size, image.size), recipe.model.image
    transform = ImageTransform(size, image.mean, image.std, seen.resize, image.interpolation, seen.tiles)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RecipeError(f"model.language.tokenizer: expected a fast tokenizer; found {type(tokenizer).__name__}")
    name = recipe.model.template
    if name not in TEMPLATES:
        raise RecipeError(f"model.template: expected one of {', '.join(TEMPLATES)}; found {name!r}")
    return ChatEncoder(tokenizer, TEMPLATES[name], IMAGE_TOKEN, transform, recipe.model.max_tokens, drop_image)


def program_of(row: Comparison, facts: Facts) -> Program:
    """The program of one row of a comparison: its pruner, its cache policy, then its mitigators."""
    methods: list[Any] = [create("prune", row.prune)] if row.prune else []
    methods += [create("kv", row.kv)] if row.kv else []
    methods += [create("mitigate", method) for method in row.mitigate]
    return tuple(pair for method in methods for pair in method.program(facts))


def decoder_of(recipe: Recipe) -> Decoder | None:
    """How the evaluation chooses tokens; None is greedily."""
    decode = recipe.evaluate.decode
    return None if decode is None else create("decode", decode)


def make_data(recipe: Recipe, progress: Any = None) -> Path | None:
    """Make the data that the recipe says is made here; nothing is done when it lies there already."""
    if recipe.data.make is None:
        return None
    return create("make", recipe.data.make, progress=progress)  # type: ignore[return-value]
