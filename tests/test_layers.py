"""Imports point one way (DESIGN §7): kernels and data know nobody, models knows kernels, vlm knows all three.

The source is parsed and never imported, so imports inside functions and names given to `import_module` count too.
"""

import ast
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "data": {"data"},
    "models": {"models", "kernels"},
    "vlm": {"vlm", "models", "data", "kernels"},
}
LINKED = ("models", "data", "kernels")
METHOD_FOLDERS = ("pruners", "kv", "mitigators", "backbones", "connectors")
NEVER_IMPORTED = {"models", "data", "kernels", "recipes", "tests", "tools"}


def sources(root: Path) -> dict[str, Path]:
    """Import name -> file, of every module of ours below `root`."""
    found = {}
    for layer in MAY_IMPORT:
        for path in sorted((root / layer).rglob("*.py")):
            inside = path.relative_to(root)
            if layer == "vlm" and inside.parts[1] in LINKED:
                continue  # the same file again, through the link
            parts = inside.with_suffix("").parts
            name = ".".join(parts if layer == "vlm" else ("vlm", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "vlm"


def imported_names(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of each import in a file; `from a import b` gives a.b; relative ones start with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{start}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                found.append((node.lineno, str(name.value).rstrip(".")))
    return found


def method_of(name: str) -> tuple[str, str] | None:
    """("pruners", "fastv") of vlm.models.pruners.fastv and of whatever lies below it."""
    parts = name.split(".")
    if parts[:2] == ["vlm", "models"] and len(parts) > 3 and parts[2] in METHOD_FOLDERS:
        return parts[2], parts[3]
    return None


def wrong_import(module: str, imported: str) -> str | None:
    """Why `module` may not import the dotted name `imported`, or None."""
    top = imported.split(".")[0]
    if not top:
        return "relative import"
    if top in NEVER_IMPORTED:
        return "not a package of ours by that name"
    if top != "vlm":
        return None
    if imported != "vlm" and layer_of(imported) not in MAY_IMPORT[layer_of(module)]:
        return f"{layer_of(module)} may not know {layer_of(imported)}"
    own, other = method_of(module), method_of(imported)
    if own and other and own != other:
        return "a method never imports another method"
    return None


def violations(root: Path) -> list[str]:
    found = [f"{layer}/__init__.py: must not exist" for layer in LINKED if (root / layer / "__init__.py").exists()]
    for module, path in sources(root).items():
        for line, imported in imported_names(path):
            if why := wrong_import(module, imported):
                found.append(f"{path.relative_to(root)}:{line}: {imported}: {why}")
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    modules = sources(root)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name for _, name in imported_names(path)]
        # `from vlm.a import b` names the module vlm.a.b or, where there is none, something inside vlm.a
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
    return graph


def cycle(root: Path) -> list[str]:
    """One cycle of imports among our modules, lazy ones included; empty if there is none."""
    try:
        TopologicalSorter(import_graph(root)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_walk_finds_the_modules():
    modules = sources(ROOT)
    assert {"vlm", "vlm.data.errors", "vlm.models.errors"} <= modules.keys()
    on_disk = [path for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py")]
    assert {path.resolve() for path in modules.values()} == {path.resolve() for path in on_disk}


def test_imports_point_one_way():
    assert violations(ROOT) == []


def test_no_import_cycles():
    assert cycle(ROOT) == []


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    for layer in MAY_IMPORT:
        shutil.copytree(ROOT / layer, tmp_path / layer, symlinks=True)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/planted.py", "from vlm.models import errors"),
        ("kernels/planted.py", "import vlm.data.errors"),
        ("kernels/planted.py", "from vlm import recipe"),
        ("data/planted.py", "from vlm.kernels.attention import attention"),
        ("data/planted.py", "def late():\n    from vlm.models.errors import ModelError"),
        ("data/planted.py", "import importlib\nimportlib.import_module('vlm.models.errors')"),
        ("models/planted.py", "from vlm.data.errors import DataError"),
        ("models/planted.py", "from vlm import data"),
        ("models/planted.py", "from importlib import import_module\nimport_module(f'vlm.module.{__name__}')"),
        ("vlm/planted.py", "import kernels.attention"),
        ("vlm/planted.py", "from tests import conftest"),
        ("vlm/planted.py", "from tools.bench_prefill import main"),
        ("vlm/planted.py", "from . import recipe"),
        ("models/pruners/planted.py", "from vlm.models.pruners.fastv import FastV"),
        ("models/pruners/planted.py", "from vlm.models.pruners import fastv"),
        ("models/mitigators/planted.py", "from vlm.models.pruners.fastv import FastV"),
        ("models/__init__.py", ""),
    ],
)
def test_a_planted_violation_is_found(planted: Path, file: str, line: str):
    before = violations(planted)
    (planted / file).parent.mkdir(exist_ok=True)
    (planted / file).write_text(line, encoding="utf-8")
    (found,) = set(violations(planted)) - set(before)
    assert found.startswith(file)


def test_what_is_allowed_is_not_reported(planted: Path):
    before = violations(planted)
    (planted / "models/planted.py").write_text("import torch\nfrom vlm.kernels.attention import attention\n")
    (planted / "vlm/planted.py").write_text("import vlm\nfrom vlm.data import errors\nfrom vlm.models import errors\n")
    assert violations(planted) == before


def test_a_planted_cycle_is_found(planted: Path):
    (planted / "data/planted_a.py").write_text("def late():\n    from vlm.data import planted_b\n")
    (planted / "data/planted_b.py").write_text("from vlm.data.planted_a import late\n")
    assert {"vlm.data.planted_a", "vlm.data.planted_b"} <= set(cycle(planted))
