"""From a file and overrides to a Recipe, with one line of error that says which line of which file to look at."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

import vlm
from vlm.recipe.errors import RecipeError, nearest
from vlm.recipe.schema import Recipe
from vlm.recipe.shorthand import normalise
from vlm.recipe.tree import Text, Tree, assign, first_place, merge, parse, place_of, stamp
from vlm.recipe.units import found

_MAX_BYTES = 1_000_000


def packaged_folder() -> Path:
    """The folder of the recipes that come with the program: ``recipes/`` beside ``vlm/``."""
    return Path(vlm.__file__).resolve().parent.parent / "recipes"


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, extend, override and check a recipe.

    Args:
        path: a YAML file, or the name of a packaged recipe (``scenes``).
        overrides: ``key.path=value`` in the order given; the value is YAML (``60``, ``null``, ``[1, 2]``).

    Raises:
        RecipeError: one line, starting with ``file:line:`` or ``override key=value:``.
    """
    file = _find(str(path), Path(), str(path))
    tree = _read(file, ())
    if "name" not in tree:
        tree = {Text("name", _show(file)): Text(file.stem, _show(file))} | tree
    for override in overrides:
        tree = normalise(_override(tree, override))
    return check(stamp(tree), _show(file))


def check(tree: Tree, source: str) -> Recipe:
    """The typed recipe of a resolved tree (or of nested Python dicts); ``source`` is named where no line is known."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        # An unknown key often makes another one missing: it is the better news.
        first = min(error.errors(), key=lambda detail: detail["type"] != "contradiction")
        raise RecipeError(_explain(first, tree, source)) from None


def _find(name: str, folder: Path, where: str) -> Path:
    """The file of a recipe given as a path from ``folder`` or as a packaged name, with or without its ending."""
    endings = ("",) if Path(name).suffix in (".yaml", ".yml") else (".yaml", ".yml", "")
    candidates = [base / f"{name}{ending}" for base in (folder, packaged_folder()) for ending in endings]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    beside = [path for base in {(folder / name).parent, packaged_folder()} for path in sorted(base.glob("*.yaml"))]
    hint = nearest(Path(name).stem, [path.stem for path in beside])
    raise RecipeError(f"{where}: there is no recipe '{name}' here or among the packaged ones{hint}")


def _show(file: Path) -> str:
    """A path as short as it can be understood."""
    short = os.path.relpath(file)
    return str(file.resolve()) if short.startswith("..") else short


def _read(file: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """The normalised tree of a file, merged over its parent's."""
    name = _show(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise RecipeError(f"{name}: is {len(content)} bytes long; a recipe has at most {_MAX_BYTES}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: is not UTF-8 text (byte {error.start})") from None
    tree = normalise(parse(text, name))
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: must be a mapping of keys, found {found(tree)}")
    extends = tree.pop("extends", None)
    return tree if extends is None else _extend(tree, extends, file, children)


def _extend(tree: dict[str, Any], extends: Tree, file: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if not isinstance(extends, Text):
        place = first_place(extends) or _show(file)
        raise RecipeError(f"{place}: extends must name one parent, found {found(extends)}")
    parent = _find(extends, file.parent, f"{extends.where}: extends")
    lineage = (*children, file.resolve())
    if parent.resolve() in lineage:
        raise RecipeError(f"{extends.where}: extends '{extends}' goes round in a circle")
    inherited = _read(parent, lineage)
    # An heir that has no name is called after its own file, or it would write into its parent's run.
    inherited.pop("name", None)
    merged = merge(inherited, tree)
    assert isinstance(merged, dict)
    return merged


def read_words(words: Iterable[str]) -> dict[str, Tree]:
    """``key=value`` words of a command line as the options of a method.

    Raises:
        RecipeError: a word without ``=``, or a value that is not YAML.
    """
    options: dict[str, Tree] = {}
    for word in words:
        key, value, where = _split(word)
        options[Text(key, where, path=key)] = value
    return options


def _override(tree: Tree, override: str) -> Tree:
    path, value, where = _split(override)
    if path == "extends":
        raise RecipeError(f"{where}: extends belongs in a file")
    return assign(tree, path, value, where)


def _split(override: str) -> tuple[str, Tree, str]:
    """The path, the value and the place that messages name."""
    where = f"override {override}"
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"{where}: is not of the form key.path=value")
    return path, parse(value, where, where), where


def _explain(detail: ErrorDetails, tree: Tree, source: str) -> str:
    """One line out of a pydantic error: place, dotted key, what is wrong with it."""
    context = detail.get("ctx", {})
    path = (*detail["loc"], *context.get("at", ()))
    if path and path[-1] == "[key]":
        path = path[:-1]
    place = place_of(tree, path) or source
    key = _dotted(tree, path)
    return f"{place}: {key} {_complaint(detail, context)}".replace("\n", " ")


def _dotted(tree: Tree, path: tuple[str | int, ...]) -> str:
    """``path`` as an override would spell it; a lone method has no index in a recipe."""
    words: list[str] = []
    for step in path:
        if isinstance(step, int) and isinstance(tree, Mapping):
            continue
        words.append(str(step))
        if isinstance(tree, Mapping):
            tree = tree.get(str(step))
        elif isinstance(tree, list) and isinstance(step, int):
            tree = tree[step] if step < len(tree) else None
    return ".".join(words) or "the recipe"


_MUST_BE = {
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
}
_BOUNDS = {"greater_than_equal": "at least {ge:g}", "greater_than": "above {gt:g}", "less_than": "below {lt:g}"}


def _complaint(detail: ErrorDetails, context: Mapping[str, Any]) -> str:
    """What is wrong, as the end of a sentence that starts with the key."""
    kind, value = detail["type"], detail["input"]
    if kind == "contradiction":
        return context["message"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "is missing"
    if kind in _MUST_BE:
        return f"must be {_MUST_BE[kind]}, found {found(value)}"
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind].format(**context)}, found {value}"
    if kind == "literal_error":
        choices = [choice.strip("' ") for choice in context["expected"].replace(" or ", ",").split(",")]
        expected = context["expected"]
        return f"must be {expected}, found {found(value)}{nearest(str(value), choices)}"
    if kind == "too_short":
        return "is empty; give at least one"
    if kind == "string_pattern_mismatch":
        return f"must be letters, digits and . _ - only, found {found(value)}"
    return f"{detail['msg'].replace('Input should be', 'must be')}, found {found(value)}"
