"""From the name of a method to the object: the file name is the name, the constructor's signature is the schema.

Names are found by listing folders, so that listing them imports nothing and optional packages stay optional;
installed packages add names through entry points of the group ``vlm.<kind>``. Only the one file that a recipe
names is imported. It holds one public class that says its ``source`` (or one public class at all); a data maker
holds a function ``make``.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, get_args, get_origin, get_type_hints

import vlm
from vlm.recipe import units
from vlm.recipe.coerce import coerce
from vlm.recipe.errors import RecipeError, unknown
from vlm.recipe.schema import Recipe
from vlm.recipe.section import Method

FOLDERS = {
    "vision": "models/backbones",
    "connector": "models/connectors",
    "head": "models/heads",
    "prune": "models/pruners",
    "kv": "models/kv",
    "mitigate": "models/mitigators",
    "decode": "models/decoders",
    "objective": "objectives",
    "benchmark": "data/benchmarks",
    "make": "data",
}
# Options that name methods themselves: the type of one -> its kind. By name, so that no library is imported for it.
_NESTED = {"vlm.models.encoder.Encoder": "vision", "vlm.models.head.Head": "head"}
# Arguments that the program fills in and no recipe may set.
_FILLED_IN = {"connector": {"vision_dim", "language_dim"}, "make": {"progress"}}


@dataclass(frozen=True)
class Option:
    """One option of a method. ``default`` is ``inspect.Parameter.empty`` where a recipe must give a value."""

    name: str
    type: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def names(kind: str) -> list[str]:
    """Every name of a kind, sorted, without importing any of them."""
    return sorted({*_files(kind), *_entry_points(kind)})


def uses_file(kind: str, name: str) -> Path | None:
    """The file that the name stands for; None when an installed entry point provides it or nothing does."""
    return _files(kind).get(name)


def create(kind: str, method: Method, *, check_only: bool = False, **given: Any) -> Any:
    """The object a recipe names, made from its options.

    Args:
        kind: one of ``FOLDERS``.
        method: name and options, as the recipe has them.
        check_only: import the file and read the options, but make nothing and return None.
        given: arguments that the program knows and a recipe may not set (the widths of a connector).

    Returns:
        The instance; for ``make``, what the function returns when it has made the data.

    Raises:
        RecipeError: unknown name or option, missing option, wrong type; with the line of the recipe.
    """
    target = _load(kind, str(method.use), method)
    arguments = read_options(target, method, {*given, *_FILLED_IN.get(kind, ())})
    for option in options(target):
        nested = _nested_kind(option.type)
        if nested and option.name in arguments:
            inner = arguments[option.name]
            made = [
                create(nested, one, check_only=check_only) for one in (inner if isinstance(inner, list) else [inner])
            ]
            arguments[option.name] = made if isinstance(inner, list) else made[0]
    return None if check_only else target(**arguments, **given)


def check(recipe: Recipe) -> None:
    """Read the options of every method of the recipe, so that a mistake in the last one is found before the first runs.

    Raises:
        RecipeError: as ``create``.
    """
    for kind, method in recipe.methods():
        create(kind, method, check_only=True)


def describe(kind: str) -> list[dict[str, Any]]:
    """What ``vlm methods --json`` prints: kind, name, source, verified, summary and options of every name.

    A method that needs a package that is not installed has ``needs`` with that package and no options.
    """
    return [_describe(kind, name) for name in names(kind)]


def _describe(kind: str, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": kind, "name": name, "source": "", "verified": "", "summary": "", "options": {}}
    try:
        target = _load(kind, name, None)
    except _NotInstalled as error:
        return {**entry, "needs": error.package}
    # A data maker is a function of our own: it is its own definition.
    own = (f"{FOLDERS[kind]}/{name}/make.py", "definition") if kind == "make" else ("", "")
    entry["source"] = getattr(target, "source", own[0])
    entry["verified"] = getattr(target, "verified", own[1])
    entry["summary"] = (inspect.getdoc(target) or "").split("\n")[0]
    for option in options(target, _FILLED_IN.get(kind, ())):
        shown = {"type": _type_name(option.type), "required": option.required}
        entry["options"][option.name] = shown if option.required else {**shown, "default": _plain(option.default)}
    return entry


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | NoneType) else str(value)


def _folder(kind: str) -> Path:
    if kind not in FOLDERS:
        raise RecipeError(f"kind {kind} {unknown(kind, FOLDERS)}")
    return Path(vlm.__file__).parent / FOLDERS[kind]


def _files(kind: str) -> dict[str, Path]:
    folder = _folder(kind)
    if kind == "make":
        return {file.parent.name: file for file in folder.glob("[!_]*/make.py")}
    return {file.stem: file for file in folder.glob("[!_]*.py")}


def _entry_points(kind: str) -> dict[str, EntryPoint]:
    _folder(kind)
    return {point.name: point for point in entry_points(group=f"vlm.{kind}")}


class _NotInstalled(RecipeError):
    def __init__(self, message: str, package: str) -> None:
        super().__init__(message)
        self.package = package


def _load(kind: str, name: str, method: Method | None) -> Callable[..., Any]:
    """The class or function that a name stands for; ``method`` is where the recipe says so."""
    start = _start(method.use if method else "", kind)
    known = names(kind)
    if name not in known:
        raise RecipeError(f"{start} {name} {unknown(name, known)}")
    try:
        if uses_file(kind, name) is None:
            return _entry_points(kind)[name].load()
        return _target(import_module(_module(kind, name)), kind)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "vlm"):
            raise
        message = f"{start} {name} needs the package '{package}', which is not installed"
        raise _NotInstalled(message, package) from None


def _module(kind: str, name: str) -> str:
    folder = FOLDERS[kind].replace("/", ".")
    return f"vlm.{folder}.{name}.make" if kind == "make" else f"vlm.{folder}.{name}"


def _target(module: ModuleType, kind: str) -> Callable[..., Any]:
    if kind == "make":
        return module.make
    public = [
        found
        for name, found in vars(module).items()
        if inspect.isclass(found) and found.__module__ == module.__name__ and not name.startswith("_")
    ]
    methods = [found for found in public if "source" in vars(found)] or public
    if len(methods) != 1:
        held = ", ".join(found.__name__ for found in methods) or "none"
        raise RecipeError(f"{module.__name__} must define one public class that says its source; it has {held}")
    return methods[0]


def options(target: Callable[..., Any], filled_in: Collection[str] = ()) -> list[Option]:
    """The arguments of a constructor or function, in order, without those that the program fills in."""
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    parameters = inspect.signature(target).parameters.values()
    return [
        Option(parameter.name, hints.get(parameter.name, Any), parameter.default)
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in filled_in
    ]


def read_options(target: Callable[..., Any], method: Method, filled_in: Collection[str] = ()) -> dict[str, Any]:
    """The options that ``method`` gives to ``target``, each as its declared type; those that name methods themselves as
    :class:`Method`.

    Raises:
        RecipeError: an unknown option, a missing one, a wrong type.
    """
    known = {option.name: option for option in options(target, filled_in)}
    read = dict(_read(method, known))
    for option in known.values():
        if option.required and option.name not in read:
            raise RecipeError(f"{_start(method.use, 'use')} {method.use} needs the option '{option.name}'")
    return read


def _read(method: Method, known: dict[str, Option]) -> Iterator[tuple[str, Any]]:
    for key, value in method.options.items():
        option = known.get(key)
        if value is None and (option is None or NoneType not in get_args(option.type)):
            # `layer: null` clears what an extended recipe set, also when the method is another one now.
            continue
        if option is None:
            raise RecipeError(f"{_start(key, key)} {unknown(key, known)}")
        try:
            yield option.name, _nested(value, option.type) if _nested_kind(option.type) else coerce(value, option.type)
        except ValueError as error:
            complaint = str(error)
            colon = "" if complaint.startswith("must ") else ":"
            raise RecipeError(f"{_start(key, key)}{colon} {complaint}") from None


def _nested_kind(annotation: Any) -> str | None:
    """The kind of the method, or of the list of methods, that an option of this type is; None for any other option."""
    inner = get_args(annotation)[:1] if get_origin(annotation) is Sequence else (annotation,)
    names = [f"{one.__module__}.{one.__qualname__}" for one in inner if inspect.isclass(one)]
    return _NESTED.get(names[0]) if names else None


def _nested(value: Any, annotation: Any) -> Method | list[Method]:
    if get_origin(annotation) is not Sequence:
        return _method(value, "must be a method such as {use: ...}, found")
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"must be a list of methods, found {units.found(value) if value else 'an empty one'}")
    return [_method(item, "must be a list of methods such as {use: ...}, with none that is") for item in value]


def _method(value: Any, complaint: str) -> Method:
    if not isinstance(value, Mapping) or "use" not in value:
        raise ValueError(f"{complaint} {units.found(value)}{' without use' if isinstance(value, Mapping) else ''}")
    return Method.model_validate(value)


def _start(text: str, fallback: str) -> str:
    """``recipes/x.yaml:7: prune.keep``: the start of a message about a key or name, which may know its place."""
    where, path = getattr(text, "where", ""), getattr(text, "path", "") or fallback
    return f"{where}: {path}" if where else path
