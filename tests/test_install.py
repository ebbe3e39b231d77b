"""Wheel, editable install and clean clone put our code under `vlm` and nowhere else.

A top-level `kernels` of ours would overwrite the package `kernels` that transformers asks for, and `data` or `models`
would collide with anyone's. None of these tests needs a network.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("models", "data", "kernels")
PACKAGE = ("vlm", *LINKED, "pyproject.toml", "README.md")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def in_layers(names: list[str]) -> set[str]:
    """The package files among names relative to the root, named as they lie in a wheel."""
    layered = {f"vlm/{name}" if name.split("/")[0] in LINKED else name for name in names}
    return {name for name in layered if name.startswith("vlm/") and not name.endswith(".md")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder appears in the checkout and none left there gets in."""
    copy = tmp_path_factory.mktemp("source")
    for name in PACKAGE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy, cwd=copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_has_one_top_level_package(wheel_names: list[str]):
    tops = {name.split("/")[0] for name in wheel_names}
    version = importlib.metadata.version("vlm-recipes")
    assert tops == {"vlm", f"vlm_recipes-{version}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package(wheel_names: list[str]):
    on_disk = [path.relative_to(ROOT) for folder in ("vlm", *LINKED) for path in (ROOT / folder).rglob("*")]
    wanted = {name for name in on_disk if (ROOT / name).is_file() and "__pycache__" not in name.parts}
    expected = in_layers([name.as_posix() for name in wanted])
    assert {"vlm/py.typed", "vlm/data/errors.py", "vlm/models/errors.py"} < expected
    assert any(name.startswith("vlm/kernels/") for name in expected)
    assert in_layers(wheel_names) == expected


def test_the_wheel_imports_from_an_empty_folder(wheel: Path, tmp_path: Path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=empty)
    assert not any((target / name).exists() for name in LINKED)
    # the editable install's finder is asked only after the paths, so the target wins
    program = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import vlm, vlm.kernels, vlm.models, vlm.data, vlm.data.errors, vlm.models.errors\n"
        "print(vlm.__file__, *vlm.kernels.__path__, *vlm.models.__path__, *vlm.data.__path__, vlm.data.errors.__file__)"
    )
    places = run(sys.executable, "-c", program, cwd=empty).split()
    assert all(Path(place).is_relative_to(target) for place in places)


def test_an_editable_install_claims_no_other_name(tmp_path: Path):
    """Asked of the environment that runs the tests, which tools/test has installed editable."""
    site = Path(sysconfig.get_paths()["purelib"])
    files = importlib.metadata.files("vlm-recipes") or []
    assert not {file.parts[0] for file in files} & {*LINKED, "recipes", "tests", "tools"}
    assert not any((site / name).exists() for name in LINKED)
    program = (
        "import importlib.util as u; print([u.find_spec(n) for n in ('models', 'data', 'kernels', 'recipes')]);"
        "import vlm.models, vlm.data, vlm.kernels"
    )
    assert run(sys.executable, "-c", program, cwd=tmp_path).strip() == "[None, None, None, None]"


@pytest.mark.skipif(
    any(name == "kernels" for name in importlib.metadata.packages_distributions()),
    reason="the hub's package `kernels` is installed",
)
def test_transformers_does_not_take_our_folder_for_its_package():
    program = (
        "import importlib.util; assert importlib.util.find_spec('kernels') is not None\n"  # the hazard is there
        "from transformers.utils.import_utils import is_kernels_available; print(is_kernels_available())"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT).split()[-1] == "False"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_clean_clone_keeps_the_links(tmp_path: Path):
    run("git", "clone", "--quiet", ROOT, tmp_path / "clone", cwd=tmp_path)
    for name in LINKED:
        link = tmp_path / "clone" / "vlm" / name
        mode = run("git", "ls-files", "-s", f"vlm/{name}", cwd=tmp_path / "clone").split()[0]
        assert mode == "120000"
        assert link.readlink() == Path("..") / name
        assert link.resolve() == (tmp_path / "clone" / name).resolve()
