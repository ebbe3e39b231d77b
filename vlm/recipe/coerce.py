"""An option's text as the type that its method declares: units, lists, choices, and types that read themselves."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vlm.recipe import units
from vlm.recipe.errors import nearest

_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: units.parse_bool,
    int: units.parse_int,
    float: units.parse_float,
    str: units.parse_str,
    Path: lambda value: Path(units.parse_str(value)),
    timedelta: lambda value: timedelta(seconds=units.parse_seconds(value)),
}
_LISTS = {tuple: tuple, list: list, Sequence: tuple}


def coerce(value: Any, annotation: Any) -> Any:
    """``value`` (recipe text, or nested dicts and lists of it) as ``annotation`` says.

    A type with a classmethod ``parse(value)`` that raises ValueError reads its scalars itself.

    Raises:
        ValueError: the end of a sentence: "must be ..., found ...".
        TypeError: the annotation is of no kind that a recipe can spell; the method's author must change it.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty):
        return units.natural(value)
    if annotation in _SCALARS:
        return _SCALARS[annotation](value)
    if origin is Annotated:
        return coerce(value, arguments[0])
    if origin in (Union, UnionType):
        return _first_that_fits(value, arguments)
    if origin is Literal:
        return _choice(value, arguments)
    if (origin or annotation) in _LISTS:
        return _list(value, _LISTS[origin or annotation], arguments)
    if (origin or annotation) in (dict, Mapping):
        return _mapping(value, arguments)
    if hasattr(annotation, "parse"):
        return annotation.parse(str(value) if isinstance(value, str) else units.natural(value))
    raise TypeError(f"a recipe cannot spell a value of type {annotation}")


def _first_that_fits(value: Any, alternatives: tuple[Any, ...]) -> Any:
    """The first alternative that reads the value; text fits everything and so comes last."""
    if value is None and NoneType in alternatives:
        return None
    complaints = []
    for alternative in sorted((a for a in alternatives if a is not NoneType), key=lambda a: a is str):
        try:
            return coerce(value, alternative)
        except ValueError as error:
            complaints.append(str(error))
    raise ValueError(", or ".join(complaints))


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == (str(choice) if isinstance(value, str) else choice):
            return choice
    expected = " or ".join(repr(choice) for choice in choices)
    raise ValueError(f"must be {expected}, found {units.found(value)}{nearest(str(value), map(str, choices))}")


def _list(value: Any, make: Callable[[Any], Any], items: tuple[Any, ...]) -> Any:
    """A list as ``tuple[X, ...]``, ``list[X]``, ``Sequence[X]`` or, of a fixed length, ``tuple[X, Y]``."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list, found {units.found(value)}")
    if make is tuple and items and items[-1] is not Ellipsis and len(items) > 1:
        if len(items) != len(value):
            raise ValueError(f"must be a list of {len(items)}, found one of {len(value)}")
        return tuple(map(coerce, value, items))
    return make(coerce(item, items[0] if items else Any) for item in value)


def _mapping(value: Any, types: tuple[Any, ...]) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, found {units.found(value)}")
    key_type, item_type = types or (str, Any)
    return {coerce(key, key_type): coerce(item, item_type) for key, item in value.items()}
