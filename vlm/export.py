"""A trained model as a folder that other programs load, adapters merged into its weights."""

from pathlib import Path

from vlm.build import build_model, build_tokenizer, for_evaluation
from vlm.models.errors import ModelError
from vlm.models.lora import merge_adapters
from vlm.models.processing import load_processor
from vlm.models.saved import save_composed
from vlm.recipe import Recipe
from vlm.training.train import trained_weights


def export(recipe: Recipe, folder: Path) -> None:
    """Write the run's trained model into an empty ``folder``.

    A model ``from`` a checkpoint becomes one of the same kind, with its processor, for Transformers; a composed one a
    folder of ours (:mod:`vlm.models.saved`). Raises ModelError for a folder with something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"export: {folder} holds something already; expected an empty folder, or none")
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model).cpu()
    merge_adapters(model)
    if recipe.model.origin is None:
        save_composed(model, folder, tokenizer=tokenizer, recipe=recipe.to_yaml())
        return
    model.model.save_pretrained(folder)
    load_processor(recipe.model.origin.name).save_pretrained(folder)
