"""Judges and word similarities that a recipe names and this package does not hold.

A name stands for an entry of `PLUGINS`, which a program fills, or for an entry point of the group `vlm.<kind>`
of an installed package. Recipes hold no code, so a name is all they can say.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from vlm.data.benchmarks._shared.files import one_of

PLUGINS: dict[str, dict[str, Callable[..., Any]]] = {"judge": {}, "similarity": {}}


def find_plugin(kind: str, name: str, builtin: tuple[str, ...], where: str) -> Callable[..., Any]:
    """The function of that name. Raises DataError with the names there are (`builtin` first) where there is none."""
    points = {point.name: point for point in entry_points(group=f"vlm.{kind}")}
    if name in PLUGINS[kind]:
        return PLUGINS[kind][name]
    one_of(name, (*builtin, *PLUGINS[kind], *points), where)
    return points[name].load()
