"""The reference of a preference stage that is the model as the stage begins: measured once, kept in the run's folder.

Before the first step every rank measures its share of the pairs that the stage will see; the numbers of all go into
``reference-stage<n>.safetensors``. A resumed run reads them back, because its model has moved on.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vlm.data.batch import Batch, Example, blank_example
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.order import Order
from vlm.data.pairs import PairEncoder
from vlm.data.store import Store
from vlm.models.program.attach import attach
from vlm.progress import Progress
from vlm.training.errors import TrainingError
from vlm.training.ranks import gather

NAME = "reference-stage{}.safetensors"


class Pairs:
    """The pairs that a stage of ``steps`` steps will see, in the order of their first time."""

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        encoder: PairEncoder,
        collate: Callable[[list[Example]], Batch],
        layout: Mapping[str, int],
        repeat: bool = False,
    ) -> None:
        self.stores, self.encoder, self.collate, self.layout = stores, encoder, collate, layout
        sizes = [store.manifest.shard_sizes for store in stores]
        self.order = Order([len(store) for store in stores], weights, layout["seed"], "full", sizes, repeat)

    def places(self) -> list[tuple[int, int]]:
        """Source and number of each sample. Raises TrainingError when two sources have a sample of one key."""
        positions = range(self.layout["steps"] * self.layout["global_batch"])
        found = list(dict.fromkeys(self.order.at(position)[:2] for position in positions))
        keys: dict[str, tuple[int, int]] = {}
        for place in found:
            key = self.stores[place[0]].key(place[1])
            if keys.setdefault(key, place) != place:
                raise TrainingError(f"reference: start goes by keys; expected each once in the mix, found {key} twice")
        return found

    def batches(self, places: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """The pairs of each sample with all its rejected answers; so many samples at a time as training takes."""
        size = self.layout["micro_batch"]
        for first in range(0, len(places), size):
            yield self.collate([pair for place in places[first : first + size] for pair in self._examples(*place)])

    def _examples(self, source: int, number: int) -> list[Example]:
        """A blank for an unreadable sample, which training skips and counts."""
        try:
            sample = self.stores[source].read(number)
            draw = Draw(number, 0, self.layout["seed"])
            return [self.encoder.pair(sample, which, draw) for which in range(len(sample.rejected))]
        except (DataError, OSError):
            return [blank_example(0, self.stores[source].key(number))]


class Measure(Callback):
    """Fill in what a preference objective must know of the start of its stage; see the module.

    Args:
        about: plain values that say which recipe, data and stage the numbers are of.
        resumed: whether the stage has begun already, so that its start is only on file.
    """

    def __init__(self, folder: Path, stage: int, pairs: Pairs, about: Mapping[str, Any], resumed: bool) -> None:
        self.path, self.stage, self.pairs, self.resumed = folder / NAME.format(stage), stage, pairs, resumed
        self.about = json.dumps({**about, "stage": stage}, sort_keys=True)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        objective = pl_module.objective
        if self.resumed:
            objective.start = self._read()
            return
        found = self._measure(trainer, pl_module)
        failure = ""
        if trainer.is_global_zero:
            try:
                self._write(found)
            except OSError as error:
                failure = error.strerror or str(error)
        if failure := gather(failure)[0]:
            raise TrainingError(f"{self.path} could not be written: {failure}")
        objective.start = found

    def _measure(self, trainer: Trainer, module: Any) -> dict[str, list[float]]:
        objective, places = module.objective, self.pairs.places()
        rounds = -(-len(places) // trainer.world_size)
        # Ranks whose weights are sharded wait for each other in every pass: all make equally many.
        mine = [places[(trainer.global_rank + n * trainer.world_size) % len(places)] for n in range(rounds)]
        batches = -(-rounds // self.pairs.layout["micro_batch"])
        progress = Progress(f"reference of {module.stage.name}", batches, quiet=not trainer.is_global_zero)
        program = tuple(pair for method in module._methods_at(0) for pair in method.program(module.model.facts))
        plugin: Any = trainer.precision_plugin
        objective.recording = {}
        try:
            with attach(module.model, program) if program else nullcontext(), plugin.forward_context():
                for done, batch in enumerate(self.pairs.batches(mine), start=1):
                    module(batch.to(module.device))
                    progress.update(done)
            ranks = gather(objective.recording)
        finally:
            objective.recording = None
        return {key: values for part in ranks for key, values in part.items()}

    def _write(self, found: Mapping[str, Sequence[float]]) -> None:
        keys = sorted(found)
        tensors = {
            "log_probs": torch.tensor([found[key] for key in keys], dtype=torch.float32),
            "keys": torch.tensor(list("\n".join(keys).encode()), dtype=torch.uint8),
        }
        part = self.path.with_suffix(".partial")
        part.write_bytes(save(tensors, {"about": self.about}))
        part.replace(self.path)

    def _read(self) -> dict[str, list[float]]:
        """Raises TrainingError for no file, a broken one, or one of another run."""
        try:
            with safe_open(self.path, "pt") as file:
                about = (file.metadata() or {}).get("about")
                keys, values = bytes(file.get_tensor("keys").tolist()).decode(), file.get_tensor("log_probs")
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"{self.path}: expected the log-probabilities of this stage's start, which a resumed run cannot "
                f"measure again: {reason}; resume from a checkpoint of an earlier stage, or run.resume=never"
            ) from None
        if about != self.about:
            raise TrainingError(f"{self.path} is of another recipe or other data; choose another run.dir")
        return dict(zip(keys.split("\n"), values.tolist(), strict=True))
