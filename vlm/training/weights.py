"""Which trained weights a recipe means, and a model that holds them."""

from pathlib import Path

from vlm.models.base import BaseVlm
from vlm.recipe import Recipe
from vlm.training import checkpoints
from vlm.training.errors import TrainingError


def find_weights(recipe: Recipe) -> Path:
    """The checkpoint that is evaluated: the newest of the run, or what ``run.weights`` means; of a recipe without
    stages what ``model.from`` names.

    Raises TrainingError when there is none.
    """
    other = recipe.run.weights
    if not recipe.stages and recipe.model.origin is not None:
        return Path(recipe.model.origin.name)
    if other is not None:
        return checkpoints.of_run(Path(other), "run.weights")
    folder = Path(recipe.run.dir) / "checkpoints"
    point = checkpoints.newest(folder)
    if point is None:
        raise TrainingError(f"{folder}: expected a checkpoint of this run, found none; run `vlm train` first")
    return point.path


def trained_weights(recipe: Recipe, model: BaseVlm) -> Path:
    """Load the checkpoint of :func:`find_weights` into ``model``, and say which it is.

    Raises TrainingError when there is none, or it is of another recipe.
    """
    path = find_weights(recipe)
    if not recipe.stages:
        return path  # the model holds them as it was built
    content = checkpoints.read(path)
    checkpoints.check_recipe(content, path, recipe.identity())
    checkpoints.load_weights(model, content, path)
    return path
