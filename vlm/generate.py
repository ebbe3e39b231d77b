"""Try a trained model on one image."""

from pathlib import Path

from vlm.build import build_encoder, build_model, build_tokenizer, decoder_of, for_evaluation, program_of
from vlm.data.errors import DataError
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.program.attach import attach
from vlm.recipe import Recipe
from vlm.training.train import trained_weights


def generate(recipe: Recipe, image: Path, prompt: str, max_new_tokens: int = 64) -> str:
    """The answer of the run's trained model, under the recipe's own methods and ``evaluate.decode``."""
    if not image.is_file():
        raise DataError(f"{image}: expected an image file, found none")
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model)
    encoder = build_encoder(recipe, model, tokenizer)
    asker = Asker(model, tokenizer, encoder, lambda key: Path(key).read_bytes(), 1, decoder_of(recipe))
    asked = Prompt(str(image), prompt, max_new_tokens)
    with attach(model, program_of(recipe.own, model.facts)):
        return asker([asked], lambda count: None)[asked]
