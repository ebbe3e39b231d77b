"""The short spellings of a recipe and the one long form that the rest of the program knows.

    - sft: {...}                      {name: sft, ...}                       an entry of stages
    prune: fastv                      {use: fastv}                           wherever a method stands
    {kind: mlp, ...}                  {use: mlp, ...}
    {timm: NAME, ...}, {hf: NAME}     {use: timm, name: NAME, ...}           under model, in model.vision.parts and
                                      model.vision.encoder (an encoder of hf is {use: huggingface, ...})
    language: {config: {...}}         {use: config, config: {...}}
    from: NAME                        {use: hf, name: NAME}                  under model
    benchmarks: {chair: {...}}        {chair: {use: chair, ...}}

Done to every file before it is merged and again after every override, so that ``stages.0.steps`` and
``model.vision.name`` mean the same whichever way the recipe was spelled. Doing it twice changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vlm.recipe.errors import RecipeError
from vlm.recipe.tree import Text, Tree

_METHODS = (
    "prune",
    "kv",
    "mitigate",
    "data.make",
    "stages.*.objective",
    "stages.*.objective.head",
    "evaluate.decode",
    "evaluate.compare.*.prune",
    "evaluate.compare.*.kv",
    "evaluate.compare.*.mitigate",
    "evaluate.compare.*.decode",
)
_LIBRARIES = ("timm", "hf")
# The keys of a stage that hold a mapping: an entry with one of these alone is no `- name: {...}`.
_STAGE_MAPPINGS = ("mix", "train", "objective", "schedule")

Change = Callable[[Tree, str], Tree]


def normalise(tree: Tree) -> Tree:
    """A copy of a whole recipe's tree with every shorthand written out."""
    tree = _change(tree, ["stages", "*"], _stage)
    tree = _change(tree, ["model", "*"], _part)
    for place in (["parts", "*"], ["encoder"]):
        tree = _change(tree, ["model", "vision", *place], lambda value, _: _part(value, "vision"))
    tree = _change(tree, ["evaluate", "benchmarks", "*"], _benchmark)
    for place in _METHODS:
        tree = _change(tree, place.split("."), _method)
    return tree


def _change(tree: Tree, steps: Sequence[str], change: Change, key: str = "") -> Tree:
    """``tree`` with ``change(value, key)`` at the places that ``steps`` names; ``*`` is every entry."""
    if not steps:
        return change(tree, key)
    step, rest = steps[0], steps[1:]
    if isinstance(tree, list) and step == "*":
        return [_change(item, rest, change) for item in tree]
    if isinstance(tree, dict):
        return {
            name: _change(value, rest, change, name) if step in (name, "*") else value for name, value in tree.items()
        }
    return tree


def _stage(item: Tree, _: str) -> Tree:
    """``{sft: {...}}`` -> ``{name: sft, ...}``; an entry that already has a name stays."""
    if not isinstance(item, dict) or len(item) != 1:
        return item
    [(name, body)] = item.items()
    if isinstance(body, list | str) or name in _STAGE_MAPPINGS:
        return item
    body = body or {}
    head: dict[str, Any] = {Text("name", _place(name)): Text(name, _place(name))}
    if "name" in body:
        raise RecipeError(f"{_place(name)}: stage {name} has a second name, '{body['name']}'")
    return head | body


def _method(value: Tree, _: str) -> Tree:
    """A bare name, or ``kind:`` where there is no ``use:``, becomes ``use:``; a list is a list of methods."""
    if isinstance(value, list):
        return [_method(item, "") for item in value]
    if isinstance(value, str):
        return {Text("use", _place(value)): value}
    if not isinstance(value, dict) or "use" in value:
        return value
    return {Text("use", _place(name)) if name == "kind" else name: option for name, option in value.items()}


def _benchmark(value: Tree, label: str) -> Tree:
    """A benchmark that names no method is the one of its label."""
    value = _method(value, "")
    if isinstance(value, dict) and "use" not in value:
        return {Text("use", _place(label)): Text(label, _place(label))} | value
    return value


def _part(value: Tree, key: str) -> Tree:
    """A part of the model: ``timm:`` and ``hf:`` name a library and a model in it, ``config:`` a language model."""
    if key not in ("from", "vision", "connector", "language"):
        return value
    if key == "from" and isinstance(value, str):
        return {Text("use", _place(value)): Text("hf", _place(value)), Text("name", _place(value)): value}
    if not isinstance(value, dict):
        return _method(value, "")
    names = {name: name for name in value}
    for library in filter(names.__contains__, _LIBRARIES):
        place = _place(names[library])
        if "name" in value and "use" not in value:
            raise RecipeError(f"{place}: model.{key}.{library} is a name already; it has another, '{value['name']}'")
        use = "huggingface" if (key, library) == ("vision", "hf") else library
        head: dict[str, Any] = {Text("use", place): Text(use, place), Text("name", place): value[library]}
        return head | {name: option for name, option in value.items() if name not in ("use", "name", library)}
    if key == "language" and "config" in value and not {"use", "kind"} & names.keys():
        place = _place(names["config"])
        return {Text("use", place): Text("config", place)} | value
    return _method(value, "")


def _place(text: str) -> str:
    return getattr(text, "where", "")
