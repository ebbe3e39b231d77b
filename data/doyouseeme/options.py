"""Tasks of "Do You See Me" that show a target above four options, one of which is it.

A figure is a list of primitives in a field of 200 by 200: a shape with place, radius, turn and aspect. Options that
are not the target differ from it by what the task varies, and from each other.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.doyouseeme.shapes import Paper, Point, corners, outline

Spec = dict[str, Any]
FIELD = 200
_PRIMITIVES = ("circle", "square", "triangle", "line")
_TARGET = (110, 10, 180)  # left, top, side
_OPTIONS = ((8, 250), (106, 250), (204, 250), (302, 250))
_SIDE = 90
CLOSURE_SHAPES = ("triangle", "rectangle", "pentagon", "hexagon", "star", "circle", "capsule")


def ask(spec: Spec) -> list[tuple[str, str]]:
    """No question of its own; the answer is the number of the option, counted from 1."""
    return [("", str(spec["answer"]))]


def _primitive(rng: np.random.Generator) -> Spec:
    x, y = (float(round(v, 1)) for v in rng.uniform(50, 150, 2))
    return {
        "shape": _PRIMITIVES[rng.integers(4)],
        "x": x,
        "y": y,
        "radius": float(round(rng.uniform(15, 40), 1)),
        "turn": float(rng.integers(360)),
        "aspect": 1.0,
    }


def _among(rng: np.random.Generator, target: Any, others: list[Any]) -> tuple[list[Any], int]:
    """The target among the others at a random place, and that place counted from 1."""
    answer = int(rng.integers(len(others) + 1))
    return [*others[:answer], target, *others[answer:]], answer + 1


def _different(rng: np.random.Generator, target: list[Spec], change: Any) -> list[list[Spec]]:
    """Three changed copies, no two alike."""
    found: list[list[Spec]] = []
    while len(found) < 3:
        copy = change(rng, [dict(one) for one in target])
        if copy != target and copy not in found:
            found.append(copy)
    return found


# figure and ground: the target lies under strokes


def draw_figure_ground(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    """A figure of some primitives, with strokes over the target only; density 1 would be 120 strokes."""
    count, density = setting
    target = [_primitive(rng) for _ in range(count)]
    figures, answer = _among(rng, target, _different(rng, target, _moved))
    ends = rng.uniform(0, FIELD, (round(120 * density), 2))
    turns = rng.uniform(0, np.pi, len(ends))
    noise = [
        [round(float(np.clip(v, 0, FIELD)), 1) for v in (x, y, x + 24 * np.cos(a), y + 24 * np.sin(a))]
        for (x, y), a in zip(ends, turns, strict=True)
    ]
    return {"target": target, "noise": noise, "options": figures, "answer": answer}


def _moved(rng: np.random.Generator, figure: list[Spec]) -> list[Spec]:
    """One primitive in two (at least one) at another place, and turned."""
    for place in rng.permutation(len(figure))[: max(1, len(figure) // 2)]:
        one = figure[place]
        x, y = rng.choice([-1, 1], 2) * rng.uniform(20, 40, 2)
        one["x"], one["y"] = (round(float(np.clip(v, 40, 160)), 1) for v in (one["x"] + x, one["y"] + y))
        one["turn"] = float((one["turn"] + rng.integers(40, 140)) % 360)
    return figure


# form constancy: the others are turned, stretched, scaled, and perhaps of other shapes


def draw_form_constancy(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    """A figure of three to six primitives; each other option varies at least one of them by the setting."""
    turn, aspect, size, swaps = setting
    target = [_primitive(rng) for _ in range(int(rng.integers(3, 7)))]

    def varied(rng: np.random.Generator, figure: list[Spec]) -> list[Spec]:
        for place in rng.permutation(len(figure))[: int(rng.integers(1, len(figure) + 1))]:
            one = figure[place]
            one["turn"] = float((one["turn"] + turn * (1 if rng.random() < 0.5 else -1)) % 360)
            one["aspect"], one["radius"] = aspect, round(one["radius"] * size, 1)
            if swaps:
                one["shape"] = _PRIMITIVES[(_PRIMITIVES.index(one["shape"]) + int(rng.integers(1, 4))) % 4]
        return figure

    figures, answer = _among(rng, target, _different(rng, target, varied))
    return {"target": target, "noise": [], "options": figures, "answer": answer}


def render_figures(spec: Spec) -> Image.Image:
    """The target with its noise above, the options below."""
    paper = Paper()
    _figure(paper, spec["target"], *_TARGET)
    scale = _TARGET[2] / FIELD
    for x0, y0, x1, y1 in spec["noise"]:
        paper.line(
            [(_TARGET[0] + x0 * scale, _TARGET[1] + y0 * scale), (_TARGET[0] + x1 * scale, _TARGET[1] + y1 * scale)], 1
        )
    for number, ((left, top), figure) in enumerate(zip(_OPTIONS, spec["options"], strict=True), start=1):
        _figure(paper, figure, left, top, _SIDE)
        paper.text(str(number), left + _SIDE / 2 - 5, top + _SIDE + 10)
    return paper.picture()


def _figure(paper: Paper, figure: list[Spec], left: float, top: float, side: float) -> None:
    scale = side / FIELD
    _frame(paper, left, top, side)
    for one in figure:
        x, y = left + one["x"] * scale, top + one["y"] * scale
        points = outline(one["shape"], x, y, one["radius"] * scale, one["turn"], one["aspect"])
        paper.shape(points, width=max(1.0, 2 * scale))


def _frame(paper: Paper, left: float, top: float, side: float) -> None:
    right, bottom = left + side, top + side
    paper.shape([(left, top), (right, top), (right, bottom), (left, bottom)], width=1, colour="gray")


# closure: the options are incomplete, and three of them would complete to something else

_PIECES = 24  # an outline is cut into about so many straight pieces


def pieces(shape: str) -> list[Point]:
    """The corners of an outline of radius 1, with points between them so that there are at least 24."""
    found = corners(shape)
    parts = -(-_PIECES // len(found))
    return [
        (x0 + (x1 - x0) * k / parts, y0 + (y1 - y0) * k / parts)
        for (x0, y0), (x1, y1) in itertools.pairwise([*found, found[0]])
        for k in range(parts)
    ]


def draw_closure(rng: np.random.Generator, setting: tuple[Any, ...]) -> Spec:
    """Of each option some pieces of the outline are left out whole and some by half; of the three others, points are
    moved by the setting's share of the radius, never where a piece is left out."""
    shape, offset, moved, whole, half = setting
    count = len(pieces(shape))
    drawn = []
    while len(drawn) < 4:
        places = [int(p) for p in rng.choice(count // 2, moved + whole + half, replace=False) * 2]
        shifts = (
            {} if not drawn else {str(p): [float(offset * s) for s in rng.choice([-1, 1], 2)] for p in places[:moved]}
        )
        # piece p runs from point p to the next; even points move, odd pieces go: what was moved keeps one of its sides
        gone = [(p + 1) % count for p in places[moved:]]
        option = {"shifts": shifts, "whole": gone[:whole], "half": gone[whole:]}
        if option not in drawn:
            drawn.append(option)
    figures, answer = _among(rng, drawn[0], drawn[1:])
    return {"shape": shape, "options": figures, "answer": answer}


def render_closure(spec: Spec) -> Image.Image:
    """The complete outline above, the options below."""
    paper = Paper()
    points = pieces(spec["shape"])
    complete = {"shifts": {}, "whole": [], "half": []}
    _outline(paper, points, complete, *_TARGET)
    for number, ((left, top), option) in enumerate(zip(_OPTIONS, spec["options"], strict=True), start=1):
        _outline(paper, points, option, left, top, _SIDE)
        paper.text(str(number), left + _SIDE / 2 - 5, top + _SIDE + 10)
    return paper.picture()


def _outline(paper: Paper, points: list[Point], option: Spec, left: float, top: float, side: float) -> None:
    _frame(paper, left, top, side)
    shifted = []
    for place, (x, y) in enumerate(points):
        dx, dy = option["shifts"].get(str(place), (0.0, 0.0))
        shifted.append((left + side * (0.5 + 0.38 * (x + dx)), top + side * (0.5 + 0.38 * (y + dy))))
    for place, (start, end) in enumerate(itertools.pairwise([*shifted, shifted[0]])):
        if place in option["whole"]:
            continue
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        paper.line([start, middle if place in option["half"] else end], width=side / 60)
