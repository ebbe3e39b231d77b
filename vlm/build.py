"""From a recipe to the objects it names: model, tokenizer, encoder of samples, data."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm.companion import companion
from vlm.create import create
from vlm.data.batch import collate
from vlm.data.chat import TEMPLATES, ChatEncoder
from vlm.data.errors import DataError
from vlm.data.images import ImageTransform
from vlm.data.index import load_manifest
from vlm.models.language import build_language, load_language, load_tokenizer
from vlm.models.lora import Lora, adapt
from vlm.models.pretrained import PretrainedVlm, load_pretrained
from vlm.models.processing import load_processor
from vlm.models.program.artifact import Shelf, digest, fingerprint
from vlm.models.program.decode import Decoder
from vlm.models.program.program import Program
from vlm.models.program.signals import Facts
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import VisionLanguageModel
from vlm.processed import CollateProcessed, ProcessorEncoder, stop_tokens
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.schema import Comparison


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names; that of its language model or checkpoint when it names none."""
    if recipe.model.origin is not None:
        return load_processor(recipe.model.origin.name).tokenizer
    language = recipe.model.language
    assert language is not None  # the schema asks for it
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


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, meta: bool = False) -> Any:
    """The recipe's model, composed with its seed or from a checkpoint, with the adapters that its stages train; on the
    meta device (no memory, no weights) for planning.

    It is a :class:`VisionLanguageModel` or a :class:`PretrainedVlm`. Raises ModelError when it cannot be built.
    """
    model = _composed(recipe, tokenizer, meta) if recipe.model.origin is None else _pretrained(recipe, meta)
    model.tokenize = partial(_token_ids, tokenizer)
    model.detokenize = partial(_text, tokenizer)
    model.companion = partial(companion, recipe, tokenizer, meta)
    model.shelf = Shelf(partial(artifact_path, recipe), None, {})
    torch.manual_seed(recipe.seed)  # of the adapters, whatever was drawn before
    with torch.device("meta") if meta else nullcontext():
        for role, lora in adapters_of(recipe).items():
            adapt(model.parts[role], role, lora, model.head)
    return model


def adapters_of(recipe: Recipe) -> dict[str, Lora]:
    """The adapter of each part that a stage trains with lora; stages agree on it."""
    found = [(role, training.adapter) for stage in recipe.stages for role, training in stage.train.items()]
    return {role: Lora(*adapter) for role, adapter in found if adapter is not None}


def _composed(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, meta: bool) -> VisionLanguageModel:
    spec = recipe.model
    assert spec.vision is not None and spec.connector is not None  # the schema asks for them
    torch.manual_seed(recipe.seed)
    with torch.device("meta") if meta else nullcontext():
        vision: Any = create("vision", spec.vision)
        language = _language(recipe, tokenizer, meta)
        connector: Any = create(
            "connector", spec.connector, vision_dim=vision.dim, language_dim=language.config.hidden_size
        )
        model = VisionLanguageModel(vision, connector, language, spec.image.tiles, spec.image.newline)
    for stage in recipe.stages if model.max_patches else ():
        if getattr(create("objective", stage.objective), "composed_only", False):
            raise RecipeError(
                f"{stage.objective.where or stage.name}: objective {stage.objective.use} trains the encoder on "
                f"pictures of one size; expected another encoder; found {spec.vision.use}, whose pictures keep theirs"
            )
    return model


def _pretrained(recipe: Recipe, meta: bool) -> PretrainedVlm:
    """The checkpoint. Weights that train are kept in float32; with ``precision: bf16`` the others are in bfloat16."""
    assert recipe.model.origin is not None
    model = load_pretrained(recipe.model.origin.name, meta=meta)
    trained = {role for stage in recipe.stages for role, how in stage.train.items() if how.lora is None}
    half = recipe.run.precision == "bf16"
    for role, part in model.parts.items():
        _cast(part.parameters(), torch.bfloat16 if half and role not in trained else torch.float32)
    return model


def for_evaluation(recipe: Recipe, model: Any) -> Any:
    """The trained model where it is evaluated. A checkpoint's, with ``precision: bf16``, is in bfloat16 altogether:
    outside of training nothing casts between its parts."""
    if recipe.model.origin is not None and recipe.run.precision == "bf16":
        _cast(model.parameters(), torch.bfloat16)
    model.shelf = Shelf(partial(artifact_path, recipe), partial(fingerprint, model))
    return model.to(device()).eval()


def _cast(parameters: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Weights alone: buffers such as the frequencies of rotary positions must stay exact."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What a method's own words are for the model."""
    return tokenizer.encode(text, add_special_tokens=False)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What a model's ids say, without the marks that a template puts around turns."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _language(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, meta: bool) -> Any:
    spec = recipe.model.language
    assert spec is not None
    if spec.use == "config":
        return build_language(spec.config or {}, len(tokenizer))
    if meta:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(spec.name)), attn_implementation="sdpa")
    return load_language(str(spec.name))


def build_encoder(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, drop_image: float = 0.0
) -> ChatEncoder | ProcessorEncoder:
    """What turns a sample into token ids and pixels for this model."""
    spec = recipe.model
    if spec.origin is not None:
        processor = load_processor(spec.origin.name)
        stops = stop_tokens(spec.origin.name, processor)
        return ProcessorEncoder(processor, model.family.image_token, stops, spec.max_tokens, drop_image)
    image = model.vision.image
    size, seen = (image.size, image.size), recipe.model.image
    transform = ImageTransform(size, image.mean, image.std, seen.resize, image.interpolation, seen.tiles)
    if model.max_patches:
        transform = replace(transform, patch=model.vision.patch, max_patches=model.max_patches)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RecipeError(f"model.language.tokenizer: expected a fast tokenizer; found {type(tokenizer).__name__}")
    if spec.template not in TEMPLATES:
        raise RecipeError(f"model.template: expected one of {', '.join(TEMPLATES)}; found {spec.template!r}")
    return ChatEncoder(tokenizer, TEMPLATES[spec.template], IMAGE_TOKEN, transform, spec.max_tokens, drop_image)


def build_collate(encoder: ChatEncoder | ProcessorEncoder, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What makes a batch of the encoder's examples; picklable, for the workers of the stream."""
    if isinstance(encoder, ProcessorEncoder):
        return CollateProcessed(pad_id(tokenizer), encoder.image_id)
    return partial(collate, pad_id=pad_id(tokenizer))


def program_of(row: Comparison, facts: Facts) -> Program:
    """The program of one row of a comparison: its pruner, its cache policy, then its mitigators."""
    methods: list[Any] = [create("prune", row.prune)] if row.prune else []
    methods += [create("kv", row.kv)] if row.kv else []
    methods += [create("mitigate", method) for method in row.mitigate]
    return tuple(pair for method in methods for pair in method.program(facts))


def artifact_path(recipe: Recipe, who: str, settings: Mapping[str, Any]) -> Path:
    """Where the calibration of a method lies: named after the recipe's model, the method's settings and the data."""
    model = {key: value for key, value in recipe.identity().items() if key not in ("mitigate", "kv")}
    data = [_hash(list(source.shards)) for source in recipe.data.sources.values()]
    return Path(recipe.run.dir) / "calibration" / f"{who}-{digest(model, dict(settings), data)}.safetensors"


def _hash(shards: list[str]) -> str:
    """The hash of a source; of one that is yet to be made there is none."""
    try:
        return load_manifest(shards).hash
    except DataError:
        return ""


def decoder_of(recipe: Recipe, row: Comparison | None = None) -> Decoder | None:
    """How the evaluation, or a row of it that says so itself, chooses tokens; None is greedily."""
    decode = (row and row.decode) or recipe.evaluate.decode
    return None if decode is None else create("decode", decode)


def make_data(recipe: Recipe, progress: Any = None) -> Path | None:
    """Make the data that the recipe says is made here; nothing is done when it lies there already."""
    if recipe.data.make is None:
        return None
    return create("make", recipe.data.make, progress=progress)  # type: ignore[return-value]
