"""Names are files; options are signatures; a mistake in either is one line with the recipe's place in it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

import vlm
from vlm import create as creation
from vlm.create import FOLDERS, create, describe, names, uses_file
from vlm.recipe import Method, RecipeError
from vlm.recipe.coerce import coerce
from vlm.recipe.load import read_words

ROOT = Path(vlm.__file__).parent


@dataclass(frozen=True)
class Plugin:
    """A method of another package.

    More about it.
    """

    source = "a paper"
    verified = "paper"

    width: int
    ratio: float = 0.5
    layers: tuple[int, ...] = (1, 2)
    mode: Literal["fast", "exact"] = "exact"
    limit: int | None = 3
    flag: bool = True


class InstalledPoint:
    """What importlib.metadata gives for an installed entry point."""

    name = "plugin"

    def load(self) -> type[Plugin]:
        return Plugin


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creation, "entry_points", lambda group: [InstalledPoint()] * (group == "vlm.prune"))


def method(name: str, *options: str) -> Method:
    return Method.model_validate({"use": name, **read_words(options)})


def message(kind: str, name: str, *options: str) -> str:
    with pytest.raises(RecipeError) as error:
        create(kind, method(name, *options), check_only=True)
    return str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if kind != "make"])
def test_names_are_the_files_of_the_folder(kind: str):
    files = {path.stem: path for path in (ROOT / FOLDERS[kind]).iterdir() if path.suffix == ".py"}
    public = sorted(name for name in files if not name.startswith("_"))
    assert public
    assert names(kind) == public
    assert [uses_file(kind, name) for name in public] == [files[name] for name in public]


def test_a_data_maker_is_a_folder_with_a_make_file():
    assert "scenes" in names("make")
    assert uses_file("make", "scenes") == ROOT / "data/scenes/make.py"
    assert uses_file("make", "importers") is None


def test_listing_imports_no_method_and_nothing_heavy():
    code = (
        "import sys\n"
        "from vlm.create import FOLDERS, names\n"
        "for kind in FOLDERS: assert names(kind)\n"
        "print([m for m in sys.modules if m in ('torch', 'timm', 'transformers') or m.startswith(('vlm.models', "
        "'vlm.data', 'vlm.objectives'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_file_keeps_the_contract_of_a_method(kind: str):
    for entry in describe(kind):
        assert set(entry) == {"kind", "name", "source", "verified", "summary", "options"}
        for key in ("source", "verified", "summary"):
            assert entry[key], f"{kind} {entry['name']} does not say its {key}"
        assert json.loads(json.dumps(entry)) == entry


def test_describe_tells_the_options(plugin: None):
    (entry,) = [entry for entry in describe("prune") if entry["name"] == "plugin"]
    assert entry == {
        "kind": "prune",
        "name": "plugin",
        "source": "a paper",
        "verified": "paper",
        "summary": "A method of another package.",
        "options": {
            "width": {"type": "int", "required": True},
            "ratio": {"type": "float", "required": False, "default": 0.5},
            "layers": {"type": "tuple[int, ...]", "required": False, "default": [1, 2]},
            "mode": {"type": "Literal['fast', 'exact']", "required": False, "default": "exact"},
            "limit": {"type": "int | None", "required": False, "default": 3},
            "flag": {"type": "bool", "required": False, "default": True},
        },
    }


def test_an_installed_entry_point_adds_a_name(plugin: None):
    assert "plugin" in names("prune")
    assert "plugin" not in names("mitigate")
    assert uses_file("prune", "plugin") is None
    made = create("prune", method("plugin", "width=8k", "ratio=20%", "layers=[3, 4]", "mode=fast", "flag=false"))
    assert made == Plugin(8000, 0.2, (3, 4), "fast", 3, False)


def test_null_is_a_value_where_the_option_may_be_null_and_clears_it_elsewhere(plugin: None):
    assert create("prune", method("plugin", "width=1", "limit=null", "ratio=null", "other=null")) == Plugin(
        1, limit=None
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        (("widht=1",), "override widht=1: widht is unknown; did you mean 'width'? Known: flag, layers, limit, mode, "
         "ratio, width"),
        (("width=wide",), "override width=wide: width must be a whole number such as 20 or 8k, found 'wide'"),
        (("width=1", "mode=exat"),
         "override mode=exat: mode must be 'fast' or 'exact', found 'exat'; did you mean 'exact'?"),
        (("width=1", "layers=3"), "override layers=3: layers must be a list, found '3'"),
        (("width=1", "layers=[1, b]"),
         "override layers=[1, b]: layers must be a whole number such as 20 or 8k, found 'b'"),
        (("width=1", "flag=on"), "override flag=on: flag must be true or false, found 'on'"),
        ((), "use plugin needs the option 'width'"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_option(plugin: None, options: tuple[str, ...], expected: str):
    assert message("prune", "plugin", *options) == expected


def test_a_mistake_in_a_name():
    assert message("prune", "fastvv").startswith("prune fastvv is unknown; did you mean 'fastv'? Known: ")
    assert (
        message("pruner", "fastv")
        == f"kind pruner is unknown; did you mean 'prune'? Known: {', '.join(sorted(FOLDERS))}"
    )


def test_a_type_of_the_method_reads_itself():
    budget = create("prune", method("fastv", "keep=25%")).keep
    assert (budget.ratio, budget.tokens) == (0.25, None)
    assert create("prune", method("fastv", "keep=1")).keep.tokens == 1
    assert create("prune", method("fastv", "keep=1.0")).keep.everything
    assert message("prune", "fastv", "keep=0%").startswith("override keep=0%: keep: expected a share")


def test_what_the_program_fills_in_is_no_option():
    connector = create("connector", method("mlp", "depth=1"), vision_dim=6, language_dim=4)
    assert [parameter.shape for parameter in connector.parameters()] == [(4, 6), (4,)]
    assert message("connector", "mlp", "vision_dim=3").endswith("vision_dim is unknown. Known: depth, shuffle")
    assert create("connector", method("mlp"), check_only=True) is None


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'open_clip.model'", name="open_clip.model")

    monkeypatch.setattr(creation, "import_module", absent)
    expected = "prune fastv needs the package 'open_clip', which is not installed"
    assert message("prune", "fastv") == expected
    assert {entry["needs"] for entry in describe("prune")} == {"open_clip"}


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        ("8k", int, 8000),
        ("20%", float, 0.2),
        ("12", str, "12"),
        ("a/b", Path, Path("a/b")),
        ("2h", timedelta, timedelta(hours=2)),
        (["1", "0.5"], tuple[int, float], (1, 0.5)),
        (["1", "2"], list[int], [1, 2]),
        (["a", "b"], Sequence[str], ("a", "b")),
        (["a"], str | Sequence[str], ("a",)),
        ("a", str | Sequence[str], "a"),
        ("3", str | int, 3),
        ("0.5", int | float, 0.5),
        (None, int | None, None),
        ("2", Literal[1, 2], 2),
        ({"a": "1"}, dict[str, int], {"a": 1}),
        ({"a": ["1", "b"]}, Any, {"a": [1, "b"]}),
        ({"a": "1"}, Mapping, {"a": 1}),
    ],
)
def test_coercion_by_declared_type(value: Any, annotation: Any, expected: Any):
    found = coerce(value, annotation)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (["1"], tuple[int, int], "must be a list of 2, found one of 1"),
        ("x", int | float,
         "must be a whole number such as 20 or 8k, found 'x', or must be a number such as 0.1 or 2e-6, "
         "found 'x'"),
        ("x", dict[str, int], "must be a mapping, found 'x'"),
        (None, int, "must be a whole number such as 20 or 8k, found nothing"),
        (["a"], str, "must be text, found a list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(value: Any, annotation: Any, expected: str):
    with pytest.raises(ValueError) as error:
        coerce(value, annotation)
    assert str(error.value) == expected


def test_a_type_no_recipe_can_spell_is_the_authors_mistake():
    with pytest.raises(TypeError, match="cannot spell"):
        coerce("x", complex)
