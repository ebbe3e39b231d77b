"""A trained head asked for classes: what a benchmark that judges an encoder alone calls answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.create import create
from vlm.evaluation.answer import Asker, Prompt
from vlm.recipe import Recipe, RecipeError
from vlm.training import checkpoints
from vlm.training.errors import TrainingError

BEST = 5  # classes of an answer


def asks_head(benchmark: Any) -> bool:
    """Whether a benchmark is answered by the head of a classifying stage and not in words."""
    return getattr(benchmark, "by_head", False)


def check_heads(recipe: Recipe) -> None:
    """Refuse a benchmark of classes where no head is trained for it, or where a row's methods would change nothing.

    Raises RecipeError.
    """
    for label, method in recipe.evaluate.benchmarks.items():
        if not asks_head(create("benchmark", method)):
            continue
        where = f"{method.where or 'evaluate'}: benchmark {label}"
        if not recipe.stages or not getattr(create("objective", recipe.stages[-1].objective), "classifies", False):
            found = f"{recipe.stages[-1].objective.use}" if recipe.stages else "no stage"
            raise RecipeError(
                f"{where} asks the head that the last stage trains; expected its objective to be classify; "
                f"found {found}"
            )
        for row in recipe.comparisons:
            if not row.is_plain:
                raise RecipeError(
                    f"{where} judges the encoder alone, which no pruner, cache policy or mitigator changes; expected "
                    f"none in evaluate.compare; found {row.title}"
                )


class ClassAsker(Asker):
    """Answers a picture with its best classes, a line each, best first."""

    def __init__(self, recipe: Recipe, weights: Path, *rest: Any) -> None:
        """weights: the checkpoint of the last stage, which has its head. ``rest`` as :class:`Asker` takes it.

        Raises TrainingError for a checkpoint of another stage.
        """
        super().__init__(*rest)
        last = recipe.stages[-1]
        if checkpoints.point_of(weights, "weights").stage != len(recipe.stages) - 1:
            raise TrainingError(f"{weights}: expected a checkpoint of stage {last.name}, whose head is asked")
        content = checkpoints.read(weights)
        self.objective = create("objective", last.objective).build(self.model, tuple(content["classes"]))
        own = {k.removeprefix("objective."): v for k, v in content["state_dict"].items() if k.startswith("objective.")}
        self.objective.load_state_dict(own)
        self.objective.to(next(self.model.parameters()).device).eval()

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers to one batch."""
        device = next(self.model.parameters()).device
        pixels = torch.stack([self._image(prompt.images[0]).pixels[0] for prompt in prompts]).to(device)
        best = self.objective.logits(self.model, pixels).topk(min(BEST, len(self.objective.tags)), 1).indices
        return ["\n".join(self.objective.tags[place] for place in places) for places in best.tolist()]
