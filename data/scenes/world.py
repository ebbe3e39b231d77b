"""What is in a scene: which classes come together, where they stand, how faint they are.

The biased world draws a context (Zipf) and then its four expected classes with falling probability, so that things
co-occur as strongly as in photographs and some are popular. Faint objects leave ambiguous evidence, and there a model
trained on this world says what usually comes along: it hallucinates for the reason large models do. The uniform world
is the control arm: every class on its own, nothing to expect. Its parameters were fixed before any method was tried.

The objects of a scene are listed as they were drawn: those of its context by slot, then the others by class number.
POPE asks about the first three of this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from vlm.data.errors import DataError
from vlm.data.scenes.classes import CLASSES, CONTEXTS, SLOTS, context_of, slot_of

SIZE = 48  # pixels of a side
CELL = 12
CELLS = (SIZE // CELL) ** 2

SPLITS = ("train", "test", "counterfactual")
PRESENT_IN_CONTEXT = (0.95, 0.85, 0.70, 0.45)  # by slot
PRESENT_ELSEWHERE = 0.04
PRESENT_UNIFORM = 0.18
FEWEST, MOST = 3, 8
COUNTERFACTUAL_FEWEST = 4
ZIPF_EXPONENT = 0.7
SIDE = (6, 10)  # pixels, inclusive
OPACITY = (0.2, 1.0)

Kind = Literal["biased", "uniform"]


@dataclass(frozen=True)
class Object:
    """One thing in a picture. `bbox` is (x, y, width, height) in pixels from the top left, as in COCO."""

    name: str
    cls: int
    cell: int
    bbox: tuple[int, int, int, int]
    opacity: float
    size: int


@dataclass(frozen=True)
class Scene:
    """Everything a picture is made from. `seed` gives background and noise; `context` is "" in the uniform world."""

    objects: tuple[Object, ...]
    context: str
    split: str
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The classes present, each once, in drawing order."""
        return tuple(item.name for item in self.objects)

    def to_meta(self) -> dict[str, Any]:
        """The scene as plain JSON values: what a shard's record carries, enough to render the same pixels again."""
        objects = [
            {
                "name": item.name,
                "class": item.cls,
                "cell": item.cell,
                "bbox": list(item.bbox),
                "opacity": item.opacity,
                "size": item.size,
            }
            for item in self.objects
        ]
        return {"objects": objects, "context": self.context, "split": self.split, "seed": self.seed}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Scene:
        """The inverse of `to_meta`."""
        objects = tuple(
            Object(o["name"], o["class"], o["cell"], tuple(o["bbox"]), o["opacity"], o["size"]) for o in meta["objects"]
        )
        return cls(objects, meta["context"], meta["split"], meta["seed"])


def generator(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """The random numbers of one scene: independent for each (seed, split, index, purpose), the same on every machine.

    `purpose` keeps what is said about a scene (1, 2, ...) apart from what is in it (0).
    """
    key = (SPLITS.index(split), index, purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _context_table() -> np.ndarray:
    """Cumulative probability of the contexts: Zipf over their order."""
    weight = 1.0 / np.arange(1, len(CONTEXTS) + 1) ** ZIPF_EXPONENT
    return np.cumsum(weight / weight.sum())


def _presence_table() -> np.ndarray:
    """Probability of each class [context, class] in the biased world."""
    table = np.full((len(CONTEXTS), len(CLASSES)), PRESENT_ELSEWHERE)
    for number in range(len(CLASSES)):
        table[context_of(number), number] = PRESENT_IN_CONTEXT[slot_of(number)]
    return table


_CONTEXT_TABLE = _context_table()
_PRESENCE_TABLE = _presence_table()


def _place(numbers: list[int], free_cells: np.ndarray, rng: np.random.Generator) -> tuple[Object, ...]:
    """Give each class a cell of its own among `free_cells`, and a size, offset and opacity."""
    count = len(numbers)
    cells = rng.permutation(free_cells)[:count]
    sizes = rng.integers(SIDE[0], SIDE[1], count, endpoint=True)
    left = rng.integers(0, CELL - sizes, endpoint=True)
    top = rng.integers(0, CELL - sizes, endpoint=True)
    opacity = rng.uniform(*OPACITY, count)
    objects = []
    for k, number in enumerate(numbers):
        row, column = divmod(int(cells[k]), SIZE // CELL)
        side = int(sizes[k])
        box = (column * CELL + int(left[k]), row * CELL + int(top[k]), side, side)
        objects.append(Object(CLASSES[number].name, number, int(cells[k]), box, float(opacity[k]), side))
    return tuple(objects)


@dataclass(frozen=True)
class World:
    """A distribution over scenes: "biased" has contexts, "uniform" is the control without any co-occurrence."""

    kind: Kind = "biased"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise DataError(f"scenes: world must be 'biased' or 'uniform', found {self.kind!r}")

    def draw(self, rng: np.random.Generator, split: str) -> Scene:
        """A scene of 3 to 8 objects, drawn anew until it has as many."""
        while True:
            context, numbers = self._draw_classes(rng)
            if FEWEST <= len(numbers) <= MOST:
                break
        objects = _place(numbers, np.arange(CELLS), rng)
        return Scene(objects, context, split, int(rng.integers(2**63)))

    def _draw_classes(self, rng: np.random.Generator) -> tuple[str, list[int]]:
        if self.kind == "uniform":
            return "", np.flatnonzero(rng.random(len(CLASSES)) < PRESENT_UNIFORM).tolist()
        context = int(np.searchsorted(_CONTEXT_TABLE, rng.random(), side="right"))
        present = np.flatnonzero(rng.random(len(CLASSES)) < _PRESENCE_TABLE[context]).tolist()
        return CONTEXTS[context], sorted(present, key=lambda number: context_of(number) != context)

    def counterfactual(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The same scene without the two things most expected in it, filled up to four with things from elsewhere.

        What stays keeps its place, opacity, background and noise: the pair differs in the expected objects only.

        Raises:
            DataError: the scene has no context (it comes from the uniform world).
        """
        if scene.context not in CONTEXTS:
            raise DataError("scenes: a counterfactual needs a scene with a context, i.e. of the biased world")
        context = CONTEXTS.index(scene.context)
        expected = {context * SLOTS, context * SLOTS + 1}
        kept = tuple(item for item in scene.objects if item.cls not in expected)
        present = {item.cls for item in kept}
        foreign = [n for n in range(len(CLASSES)) if context_of(n) != context and n not in present]
        missing = max(0, COUNTERFACTUAL_FEWEST - len(kept))
        added = sorted(rng.permutation(foreign)[:missing].tolist())
        free = np.setdiff1d(np.arange(CELLS), [item.cell for item in scene.objects])
        return replace(scene, objects=kept + _place(added, free, rng), split="counterfactual")
