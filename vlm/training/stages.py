"""What can be wrong with a stage of preference pairs, found by the plan and again before training."""

from collections.abc import Mapping
from typing import Any

from vlm.create import create
from vlm.data.errors import DataError
from vlm.data.pairs import check_pair
from vlm.data.store import Store
from vlm.recipe import Recipe, RecipeError


def wants_pairs(objective: Any) -> bool:
    """Whether an objective learns from samples with a rejected answer."""
    return getattr(objective, "pairs", False)


def check_stage(recipe: Recipe, number: int, stores: Mapping[str, Store] | None = None) -> None:
    """Refuse what contradicts the stage's objective; its data only where ``stores`` are given.

    Raises RecipeError.
    """
    stage = recipe.stages[number]
    objective = create("objective", stage.objective)
    where = f"{stage.objective.where or 'stages'}: stage {stage.name}, objective {stage.objective.use}"
    if getattr(objective, "weights", None) == "adapter" or getattr(objective, "reference", None) == "adapter":
        _check_adapters(recipe, number, where)
    if not wants_pairs(objective):
        return
    if stage.pack:
        raise RecipeError(f"{where}: pairs are not packed; expected a stage without pack")
    objective.build(None, ())
    if objective.reference == "start" and stage.drop_image:
        raise RecipeError(f"{where}: reference: start knows each sample in one form; expected drop_image 0")
    if objective.reference == "start" and recipe.prune is not None and recipe.prune.schedule is not None:
        raise RecipeError(
            f"{where}: reference: start is measured once, but prune.schedule changes the model by the step"
        )
    for name, store in (stores or {}).items():
        _check_first(store, where, name)


def _check_adapters(recipe: Recipe, number: int, where: str) -> None:
    """Adapters off must be the model as it was when the stage began."""
    stage = recipe.stages[number]
    if not any(training.lora for training in stage.train.values()):
        raise RecipeError(f"{where}: the model without its adapters is asked for, and no part trains with lora")
    for role, training in stage.train.items():
        if not training.lora:
            raise RecipeError(
                f"{where}: without its adapters the model is to be as it was, but {role} trains its weights; give it "
                "lora, or take reference: start"
            )
    for earlier in recipe.stages[:number]:
        for role, training in earlier.train.items():
            if training.lora:
                raise RecipeError(
                    f"{where}: stage {earlier.name} has trained the adapters of {role} already, so without them the "
                    "model is not what this stage begins with; take reference: start"
                )


def _check_first(store: Store, where: str, source: str) -> None:
    """The first sample that can be read stands for all; others that are no pairs are bad samples of training."""
    for number in range(min(16, len(store))):
        try:
            sample = store.read(number)
        except (DataError, OSError):
            continue
        try:
            check_pair(sample)
        except DataError as error:
            makes = "`vlm data make-pairs` and `vlm data pack rlhf-v` make pairs"
            raise RecipeError(f"{where}: source {source}: {error}; {makes}") from None
        return
