"""What a stage trains on: its data opened, its samples' way to a batch, its length in steps."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vlm.build import build_collate, build_encoder
from vlm.create import create
from vlm.data.batch import Batch, Example
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.index import Manifest, load_manifest
from vlm.data.pairs import CollatePairs, PairEncoder
from vlm.data.store import Store
from vlm.data.stream import BadSamplePolicy, Packing
from vlm.models.base import BaseVlm
from vlm.packing import fill_of, packing_of
from vlm.recipe import Recipe
from vlm.recipe.schema import Stage
from vlm.training.datamodule import StageData
from vlm.training.reference import Pairs
from vlm.training.stages import check_stage, wants_pairs


class Sources(NamedTuple):
    """The recipe's data sources, opened."""

    manifests: dict[str, Manifest]
    stores: dict[str, Store]

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag of every source, sorted."""
        return tuple(sorted({tag for manifest in self.manifests.values() for tag in manifest.tags}))


def open_sources(recipe: Recipe) -> Sources:
    """Read the manifests of all sources of the recipe."""
    manifests = {name: load_manifest(list(source.shards)) for name, source in recipe.data.sources.items()}
    return Sources(manifests, {name: Store(manifest) for name, manifest in manifests.items()})


class StageWork(NamedTuple):
    """A stage of a recipe, ready to be trained.

    encoder: makes an example of a sample; ``collate`` a batch of examples. objective: as the recipe gives it, not yet
    built for a model. layout: numbers that say which sample comes in which batch.
    """

    stage: Stage
    stores: list[Store]
    encoder: Any
    collate: Callable[[list[Example]], Batch]
    objective: Any
    packing: Packing | None
    layout: dict[str, int]

    @property
    def weights(self) -> list[float]:
        return list(self.stage.mix.values())

    @property
    def repeat(self) -> bool:
        return self.stage.repeat is not None

    def data(self, tolerance: BadSamplePolicy) -> StageData:
        """The stream of its micro-batches."""
        return StageData(
            self.stores, self.weights, self.encoder, self.collate, self.layout, tolerance, self.packing, self.repeat
        )

    def pairs(self) -> Pairs:
        """The pairs of a preference stage, each once."""
        return Pairs(self.stores, self.weights, self.encoder, self.collate, self.layout, self.repeat)


def open_stage(
    recipe: Recipe, number: int, model: BaseVlm, tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> StageWork:
    """Get a stage ready. Raises RecipeError for data that its objective cannot learn from, DataError for a source
    without readable samples."""
    stage, run = recipe.stages[number], recipe.run
    stores = [sources.stores[name] for name in stage.mix]
    encoder = build_encoder(recipe, model, tokenizer, stage.drop_image)
    collate, objective = build_collate(encoder, tokenizer), create("objective", stage.objective)
    if wants_pairs(objective):
        check_stage(recipe, number, dict(zip(stage.mix, stores, strict=True)))
        encoder, collate = PairEncoder(encoder), CollatePairs(collate)
    packing = packing_of(recipe, stage, model, encoder)
    global_batch = stage.global_batch or run.global_batch
    layout = {
        "global_batch": global_batch,
        "micro_batch": run.micro_batch or global_batch // run.world,
        "workers": recipe.data.workers,
        "seed": recipe.seed + number,
        "steps": stage_steps(stage, global_batch, stores, encoder, packing, recipe.seed + number),
    }
    return StageWork(stage, stores, encoder, collate, objective, packing, layout)


def stage_steps(
    stage: Stage, global_batch: int, stores: list[Store], encoder: Any, packing: Packing | None = None, seed: int = 0
) -> int:
    """Steps of a stage; a length in tokens counts the mean of the first 256 samples of each source, and what a pack
    holds is told by the first 512 samples of the mixture. Without a length it is one round of all repeats."""
    if stage.steps is not None:
        return stage.steps
    samples = stage.samples
    if samples is None and stage.tokens is None:
        samples = sum(round(times) * len(store) for times, store in zip(stage.mix.values(), stores, strict=True))
    if packing is not None:
        fill = fill_of(stage, stores, seed, packing)
        step = fill.samples if samples is not None else fill.share * packing.config.tokens
        return max(1, math.ceil((samples or stage.tokens or 0) / (step * global_batch)))
    if samples is not None:
        return -(-samples // global_batch)
    assert stage.tokens is not None
    total = sum(stage.mix.values())
    parts = zip(stores, stage.mix.values(), strict=True)
    mean = sum(weight / total * _mean_tokens(store, encoder) for store, weight in parts)
    return max(1, round(stage.tokens / (mean * global_batch)))


def _mean_tokens(store: Store, encoder: Any) -> float:
    """Mean length of the first samples of a source; unreadable ones are left to training, which counts them."""
    lengths = []
    for number in range(min(256, len(store))):
        with suppress(DataError, OSError):
            lengths.append(len(encoder(store.read(number), Draw(number, 0, 0)).tokens))
    if not lengths:
        raise DataError(f"{store.manifest.shards[0].address}: expected readable samples, found none among the first")
    return sum(lengths) / len(lengths)
