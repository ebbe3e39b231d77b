"""The seven tasks in the plane of "Do You See Me" (Kanade and Ganu 2025): what is drawn, how, and what is asked.

Each task draws a specification from a random generator and the setting of its sweep, renders it, and knows its
questions: everything a picture shows is in its specification, which is plain JSON. The original generators are not
seeded, so these are pictures of the same kind over the same sweeps and not the same pictures.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.doyouseeme import options
from vlm.data.doyouseeme.shapes import LETTERS, SIZE, Paper, outline, raster
from vlm.data.errors import DataError

Spec = dict[str, Any]
Asked = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Task:
    """A task: its folder's name, its sweep, pictures per setting, and what makes a picture of a setting.

    `ask` gives the questions of a specification; a task whose questions are all alike has none and its answers stand
    alone in the file.
    """

    name: str
    sweep: tuple[tuple[Any, ...], ...]
    repeats: int
    draw: Callable[[np.random.Generator, tuple[Any, ...]], Spec]
    render: Callable[[Spec], Image.Image]
    ask: Callable[[Spec], list[Asked]]
    has_question: bool = True

    def settings(self, repeats: int | None) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """(number of the setting, number of the picture in it, setting)."""
        for number, setting in enumerate(self.sweep):
            for repeat in range(self.repeats if repeats is None else repeats):
                yield number, repeat, setting


def _product(*values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(itertools.product(*values))


def _pick(rng: np.random.Generator, values: Sequence[Any], count: int) -> list[Any]:
    """Different values, in random order."""
    return [values[k] for k in rng.permutation(len(values))[:count]]


# visual spatial: grids of black and white shapes

_FILLS = ("black", "white")
_GRID_SHAPES = ("circle", "square", "triangle")
_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_ASKED_PER_PICTURE = 3


def _draw_grids(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    rows, columns, count = setting
    grids = [
        [[[_GRID_SHAPES[rng.integers(3)], _FILLS[rng.integers(2)]] for _ in range(columns)] for _ in range(rows)]
        for _ in range(count)
    ]
    asked = []
    while len(asked) < _ASKED_PER_PICTURE:
        grid, row, column = (int(rng.integers(n)) for n in (count, rows, columns))
        direction = list(_STEPS)[rng.integers(4)]
        shape, fill = _GRID_SHAPES[rng.integers(3)], _FILLS[rng.integers(2)]
        what = ([shape, fill], [shape, None], [None, fill])[rng.integers(3)]
        if (query := [grid, row, column, direction, what]) not in asked:
            asked.append(query)
    return {"grids": grids, "asked": asked}


def _render_grids(spec: Spec) -> Image.Image:
    paper = Paper()
    across = {1: 1, 2: 2, 3: 2, 4: 2}.get(len(spec["grids"]), 3)
    down = -(-len(spec["grids"]) // across)
    width, height = SIZE / across, SIZE / down
    for number, grid in enumerate(spec["grids"]):
        left, top = number % across * width, number // across * height
        paper.text(str(number + 1), left + 4, top + 3)
        cell = min((width - 12) / len(grid[0]), (height - 28) / len(grid))
        for row, column in itertools.product(range(len(grid)), range(len(grid[0]))):
            shape, fill = grid[row][column]
            x, y = left + 6 + (column + 0.5) * cell, top + 22 + (row + 0.5) * cell
            paper.shape(outline(shape, x, y, 0.4 * cell), fill, width=1 if cell < 30 else 2)
    return paper.picture()


def _ask_grids(spec: Spec) -> list[Asked]:
    found = []
    for grid, row, column, direction, (shape, fill) in spec["asked"]:
        cells = spec["grids"][grid]
        (down, right), answer = _STEPS[direction], 0
        r, c = row + down, column + right
        while 0 <= r < len(cells) and 0 <= c < len(cells[0]):
            answer += cells[r][c][0] in (shape or cells[r][c][0],) and cells[r][c][1] in (fill or cells[r][c][1],)
            r, c = r + down, c + right
        here, line = cells[row][column], "row" if right else "column"
        what = " ".join(word for word in (fill, f"{shape}s" if shape else "objects") if word)
        text = (
            f"In grid {grid + 1}, starting from the {here[1]} {here[0]} at position (row {row + 1}, column "
            f"{column + 1}), how many {what} are there {direction} of it in the same {line}?"
        )
        found.append((text, str(answer)))
    return found


# shape discrimination: outlines, some with smaller copies inside

_OUTLINES = ("circle", "triangle", "rectangle", "pentagon", "hexagon", "octagon", "star")
_RINGS, _RING_CHANCE = 3, 0.4


def _draw_outlines(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    kinds, count, gap = setting
    shapes = _pick(rng, _OUTLINES, kinds)
    placed: list[Spec] = []
    for _ in range(count):
        rings = 1
        while rings < _RINGS and rng.random() < _RING_CHANCE:
            rings += 1
        x, y, radius = _free_place(rng, placed, gap)
        shape = shapes[rng.integers(kinds)]
        placed.append({"shape": shape, "x": x, "y": y, "radius": radius, "rings": rings})
    return {"placed": placed, "asked": placed[rng.integers(count)]["shape"]}


def _free_place(rng: np.random.Generator, placed: Sequence[Spec], gap: float) -> tuple[float, float, float]:
    """A place whose circle is `gap` pixels away from the others (less than 0: may overlap them by as much)."""
    for radius in (44.0, 38.0, 32.0, 26.0, 22.0):
        for _ in range(200):
            x, y = (float(round(v, 2)) for v in rng.uniform(radius + 4, SIZE - radius - 4, 2))
            # never one on the other: centres stay apart, so that every outline can be told
            apart = [max(radius + one["radius"] + gap, 0.55 * (radius + one["radius"])) for one in placed]
            if all(np.hypot(x - o["x"], y - o["y"]) >= d for o, d in zip(placed, apart, strict=True)):
                return x, y, radius
    raise DataError(f"doyouseeme: no place for {len(placed) + 1} shapes with a gap of {gap}")


def _render_outlines(spec: Spec) -> Image.Image:
    paper = Paper()
    for one in spec["placed"]:
        for ring in range(one["rings"]):
            paper.shape(outline(one["shape"], one["x"], one["y"], one["radius"] * (1 - ring / _RINGS)))
    return paper.picture()


def _ask_outlines(spec: Spec) -> list[Asked]:
    name = spec["asked"]
    text = (
        f"Count the total number of {name}s in the image, including each concentric {name} separately. For example, if "
        f"there is one {name} with 2 inner concentric rings, that counts as 3 {name}s. Respond with only a number."
    )
    return [(text, str(sum(one["rings"] for one in spec["placed"] if one["shape"] == name)))]


# joint shape and colour: filled shapes

_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "gray", "black")
_FILLED = ("triangle", "pentagon", "hexagon", "star", "cross", "square", "circle")
_ROOMS = 6  # shapes stand in a raster of so many by so many
_PAIRS = 5


def _draw_filled(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    kinds, most = setting
    placed: list[Spec] = []
    rooms = [int(room) for room in rng.permutation(_ROOMS * _ROOMS)]
    for shape in _pick(rng, _FILLED, kinds):
        for _ in range(1 + int(rng.integers(most))):
            room, shift = rooms.pop(), rng.uniform(-6, 6, 2)
            side = SIZE / _ROOMS
            x, y = (room % _ROOMS + 0.5) * side + shift[0], (room // _ROOMS + 0.5) * side + shift[1]
            colour = _COLOURS[rng.integers(len(_COLOURS))]
            placed.append({"shape": shape, "colour": colour, "x": round(float(x), 2), "y": round(float(y), 2)})
    pairs = list(dict.fromkeys((one["shape"], one["colour"]) for one in placed))
    return {"placed": placed, "asked": [list(pair) for pair in _pick(rng, pairs, _PAIRS)]}


def _render_filled(spec: Spec) -> Image.Image:
    paper = Paper()
    for one in spec["placed"]:
        paper.shape(outline(one["shape"], one["x"], one["y"], 22), one["colour"], width=1)
    return paper.picture()


def _ask_filled(spec: Spec) -> list[Asked]:
    counts = Counter((one["shape"], one["colour"]) for one in spec["placed"])
    return [
        (f"Count the number of {shape}'s that are {colour}.", str(counts[shape, colour]))
        for shape, colour in spec["asked"]
    ]


# letters: squares that differ from the squares around them

_SHADES = {1: 150, 2: 100, 3: 30}  # contrast -> grey of a letter's squares on squares of grey 200
_AROUND = 200


def _draw_letters(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    count, contrast, spacing = setting
    letters = "".join(LETTERS[k] for k in rng.integers(len(LETTERS), size=count))
    return {"letters": letters, "shade": _SHADES[contrast], "spacing": spacing}


def _render_letters(spec: Spec) -> Image.Image:
    """Three letters a row, each in a field of 7 by 9 squares."""
    paper = Paper()
    across = min(3, len(spec["letters"]))
    down = -(-len(spec["letters"]) // 3)
    pitch = min((SIZE - 8) / (7 * across), (SIZE - 8) / (9 * down))
    gap = spec["spacing"] * pitch
    left, top = (SIZE - 7 * across * pitch) / 2, (SIZE - 9 * down * pitch) / 2
    for place, letter in enumerate(spec["letters"]):
        dark = {(row + 1, column + 1) for row, column in raster(letter)}
        for row, column in itertools.product(range(9), range(7)):
            x, y = left + (place % 3 * 7 + column) * pitch, top + (place // 3 * 9 + row) * pitch
            shade = spec["shade"] if (row, column) in dark else _AROUND
            paper.box(x + gap, y + gap, x + pitch - gap, y + pitch - gap, (shade, shade, shade))
    return paper.picture()


TASKS = {
    task.name: task
    for task in (
        Task("visual_spatial", _product((3, 6, 9), (3, 6, 9), (1, 3, 5)), 10, _draw_grids, _render_grids, _ask_grids),
        Task(
            "geometric_dataset",
            _product((3, 7), (3, 6, 10), (10, -20, -30, -40)),
            10,
            _draw_outlines,
            _render_outlines,
            _ask_outlines,
        ),
        Task(
            "color_and_shape_disambiguation",
            _product((2, 4, 6), (2, 4, 6)),
            10,
            _draw_filled,
            _render_filled,
            _ask_filled,
        ),
        Task(
            "letter_disambiguation",
            _product((1, 5, 9), (1, 2, 3), (0.04, 0.08, 0.1)),
            5,
            _draw_letters,
            _render_letters,
            lambda spec: [("", spec["letters"])],
            has_question=False,
        ),
        Task(
            "visual_figure_ground",
            _product((2, 6, 10), (0.1, 0.3, 0.5)),
            10,
            options.draw_figure_ground,
            options.render_figures,
            options.ask,
            has_question=False,
        ),
        Task(
            "visual_form_constancy",
            _product((5, 25, 50), (0.8, 1.1, 1.4), (0.8, 1.1, 1.4), (0, 1)),
            5,
            options.draw_form_constancy,
            options.render_figures,
            options.ask,
            has_question=False,
        ),
        Task(
            "visual_closure",
            _product(options.CLOSURE_SHAPES, (0.1, 0.12, 0.14), (1, 3), (1, 3), (1, 3)),
            1,
            options.draw_closure,
            options.render_closure,
            options.ask,
            has_question=False,
        ),
    )
}
