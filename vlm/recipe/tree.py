"""A recipe before it has types: nested dicts and lists whose scalars and keys remember where they were written.

    YAML text -> parse -> tree -> merge (extends) -> assign (overrides) -> stamp -> schema

A tree is a dict, a list, a Text or None. Nothing is guessed about a scalar and no tag is obeyed, so reading a
stranger's recipe runs none of its content.
"""

from typing import Any

import yaml

from vlm.recipe.errors import RecipeError, unknown
from vlm.recipe.units import natural

Tree = dict[str, Any] | list[Any] | str | None

_MAX_DEPTH = 40
# An alias is expanded wherever it is used; a few nested ones can otherwise fill the memory.
_MAX_NODES = 100_000


class Text(str):
    """A key or scalar as written. ``where`` is file:line or the override; ``path`` is the dotted place of a key."""

    where: str
    quoted: bool
    path: str

    def __new__(cls, value: str, where: str = "", quoted: bool = False, path: str = "") -> "Text":
        text = super().__new__(cls, value)
        text.where, text.quoted, text.path = where, quoted, path
        return text


def parse(text: str, name: str, where: str = "") -> Tree:
    """The tree of one YAML document.

    Args:
        text: the document.
        name: the file's name, for places (``name:line``) and messages.
        where: one place for everything, instead of ``name:line`` (a value given on the command line).
    """
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{where or f'{name}:{line}'}: is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where or name}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where or name}: is nested too deeply") from None
    return None if root is None else _Reader(name, where).read(root, 0)


class _Reader:
    """Turns PyYAML's nodes into a tree; holds what every node needs to know."""

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where, self.nodes = name, where, 0

    def place(self, node: yaml.Node) -> str:
        return self.where or f"{self.name}:{node.start_mark.line + 1}"

    def read(self, node: yaml.Node, depth: int) -> Tree:
        self.nodes += 1
        if depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise RecipeError(f"{self.place(node)}: is nested too deeply or repeats itself through anchors")
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.read(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            return self.scalar(node)
        raise RecipeError(f"{self.place(node)}: tag {node.tag} is refused; a recipe holds only plain data")

    def scalar(self, node: yaml.ScalarNode) -> Text | None:
        if node.style is None and node.value in ("", "null", "~"):
            return None
        return Text(node.value, self.place(node), quoted=node.style is not None)

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{place}: a key must be a word, found a list or mapping")
            if key_node.value == "<<":
                raise RecipeError(f"{place}: the merge key << is not read; write the keys or use extends")
            if key_node.value in result:
                first = next(key for key in result if key == key_node.value)
                raise RecipeError(f"{place}: {first} is given twice, first at {getattr(first, 'where', '')}")
            result[Text(key_node.value, place)] = self.read(value_node, depth + 1)
        return result


def merge(parent: Tree, child: Tree) -> Tree:
    """``child`` over ``parent``: mappings merge; lists, scalars and null replace.

    A mapping that names another method (``use``) replaces the whole: the parent's other options were meant for
    the parent's method. Keys remember the file that had the last word on them.
    """
    if not isinstance(parent, dict) or not isinstance(child, dict):
        return child
    if "use" in parent and "use" in child and parent["use"] != child["use"]:
        return child
    own = {key: key for key in child}
    merged = {}
    for key, value in parent.items():
        merged[own.get(key, key)] = merge(value, child[key]) if key in child else value
    return merged | {key: value for key, value in child.items() if key not in parent}


def assign(tree: Tree, path: str, value: Tree, where: str) -> Tree:
    """A copy of ``tree`` with ``value`` at the dotted ``path``; missing mappings on the way are made."""
    return _assign(tree, path.split("."), value, where, done="")


def _assign(tree: Tree, steps: list[str], value: Tree, where: str, done: str) -> Tree:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    here = f"{done}.{step}" if done else step
    if not step:
        raise RecipeError(f"{where}: has an empty name in its path; expected key.path=value")
    if isinstance(tree, list):
        index = _index(tree, step, where, done)
        return [*tree[:index], _assign(tree[index], rest, value, where, here), *tree[index + 1 :]]
    if isinstance(tree, str):
        raise RecipeError(f"{where}: {done} is '{tree}', which has no keys")
    before = tree or {}
    changed = _assign(before.get(step), rest, value, where, here)
    key = Text(step, where)
    # Only the key whose value was given moves to the command line; those on the way keep their line.
    if rest and step in before:
        key = next(old for old in before if old == step)
    return {(key if old == step else old): (changed if old == step else kept) for old, kept in before.items()} | (
        {} if step in before else {key: changed}
    )


def _index(items: list[Any], step: str, where: str, done: str) -> int:
    """The position of ``step`` in a list: a number, or the ``name`` of one of its mappings (a stage)."""
    if step.isascii() and step.isdigit():
        if int(step) < len(items):
            return int(step)
        raise RecipeError(f"{where}: {done} has {len(items)} entries, counted from 0; {step} is none of them")
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    if step in names:
        return names.index(step)
    raise RecipeError(f"{where}: {done}.{step} {unknown(step, [*filter(None, names), *map(str, range(len(items)))])}")


def stamp(tree: Tree, path: str = "") -> Tree:
    """A copy whose keys and scalars know their dotted path, so that late errors can name it."""
    if isinstance(tree, dict):
        stamped = {}
        for key, value in tree.items():
            place = f"{path}.{key}" if path else str(key)
            stamped[Text(key, getattr(key, "where", ""), path=place)] = stamp(value, place)
        return stamped
    if isinstance(tree, list):
        return [stamp(item, f"{path}.{index}") for index, item in enumerate(tree)]
    if isinstance(tree, Text):
        return Text(tree, tree.where, tree.quoted, path)
    return tree


def place_of(tree: Tree, path: tuple[str | int, ...]) -> str:
    """Where the node at ``path`` was written, or the nearest node around it that remembers."""
    place = first_place(tree)
    for step in path:
        if isinstance(tree, dict) and step in tree:
            key = next(key for key in tree if key == step)
            place, tree = getattr(key, "where", "") or place, tree[key]
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
            place = first_place(tree) or place
        elif not isinstance(step, int):
            break
    return place


def first_place(tree: Tree) -> str:
    """The place of the first key or scalar of ``tree`` in reading order; empty if there is none."""
    if isinstance(tree, dict):
        return next((getattr(key, "where", "") for key in tree), "")
    if isinstance(tree, list):
        return next(filter(None, map(first_place, tree)), "")
    return getattr(tree, "where", "")


class _Dumper(yaml.SafeDumper):
    """Writes a Text as it was read, plain or quoted, and quotes other text that would be read as something else."""

    def text(self, data: str) -> yaml.ScalarNode:
        if data.quoted if isinstance(data, Text) else _needs_quotes(data):
            return self.represent_scalar("tag:yaml.org,2002:str", str(data), style='"')
        return self.represent_scalar(self.resolve(yaml.ScalarNode, str(data), (True, False)), str(data))

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (str, Text):
    _Dumper.add_representer(_kind, _Dumper.text)


def _needs_quotes(text: str) -> bool:
    return text in ("", "null", "~", "!", "&", "*") or natural(text) != text or not text.isprintable()


def dump(tree: Tree) -> str:
    """YAML text that ``parse`` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
