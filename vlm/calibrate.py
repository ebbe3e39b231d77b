"""Calibration: run what a method finds out about a model over samples of the recipe's data, and keep it."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vlm.build import artifact_path, build_collate, build_encoder, build_model, build_tokenizer, for_evaluation
from vlm.create import create
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.models.program.artifact import AUTO, fingerprint, write
from vlm.models.program.tune import Asked
from vlm.progress import Progress
from vlm.recipe import Recipe, RecipeError
from vlm.training.loss import inputs_of
from vlm.training.train import trained_weights


def calibrate(recipe: Recipe, name: str | None = None, source: str | None = None, samples: int = 64) -> list[Path]:
    """Calibrate the methods of the recipe that say ``calibration: auto`` (only ``name``, if given) on the first
    ``samples`` usable samples of a source (the first one, if not given). Returns the files, one for each.

    Raises RecipeError when nothing is to be calibrated or the source has no question with an answer.
    """
    found: dict[Path, tuple[str, Any]] = {}
    for row in (recipe.own, *recipe.comparisons):
        for method in row.mitigate:
            made: Any = create("mitigate", method)
            if getattr(made, "calibration", None) == AUTO and name in (None, str(method.use)):
                found[artifact_path(recipe, str(method.use), made.settings)] = (str(method.use), made)
    if not found:
        wanted = "no method" if name is None else f"no {name}"
        raise RecipeError(f"calibrate: expected a mitigator with calibration: auto; found {wanted} in the recipe")
    sources = recipe.data.sources
    if not sources or (source is not None and source not in sources):
        raise RecipeError(f"--source: expected one of the recipe's sources {', '.join(sources)}; found {source}")
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model)
    store = Store(load_manifest(list(sources[source or next(iter(sources))].shards)))
    asked = questions(recipe, model, tokenizer, store, samples)
    for path, (who, method) in found.items():
        layers, heads = model.facts.layers, model.decoder.config.num_attention_heads
        progress, done = Progress(f"calibrate {who}", layers * heads), 0

        def tick(progress: Progress = progress) -> None:
            nonlocal done
            done += 1
            progress.update(done)

        tensors = method.calibrate(model, asked, tick)
        count = sum(len(batch.answer) for batch in asked)
        about = {"method": who, "weights": fingerprint(model), "samples": str(count), "settings": str(method.settings)}
        write(path, tensors, about)
    return list(found)


def questions(recipe: Recipe, model: Any, tokenizer: Any, store: Store, samples: int) -> list[Asked]:
    """The first question of each sample up to its answer, and the token that the answer begins with."""
    encoder = build_encoder(recipe, model, tokenizer)
    collate, device = build_collate(encoder, tokenizer), next(model.parameters()).device
    numbers = iter(range(min(samples, len(store))))
    asked = []
    while chunk := list(islice(numbers, recipe.evaluate.batch)):
        batch = collate([encoder(store.read(n), Draw(position=n, epoch=0, seed=recipe.seed)) for n in chunk]).to(device)
        inputs, weights = inputs_of(batch), batch.weights
        place = torch.arange(weights.shape[1], device=device)
        first = torch.where(weights > 0, place, weights.shape[1]).amin(1)  # [B] where the answer begins
        usable = bool((first < weights.shape[1]).all()) and not bool((inputs.visual & (place >= first[:, None])).any())
        if not usable:
            raise RecipeError("calibrate: expected samples of one question, with its images before the answer, each")
        answer = inputs.tokens.gather(1, first[:, None])[:, 0]
        asked.append(Asked(inputs._replace(valid=inputs.valid & (place < first[:, None])), answer))
    return asked
