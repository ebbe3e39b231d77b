"""Everything the README prints is run: its commands, its error, its excerpts and its tables."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from vlm.commands import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "tools"))

COMMANDS = [
    line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()
]
OF_VLM = [line for line in COMMANDS if line.startswith("vlm ")]


def test_the_two_commands_stand_first_and_exist():
    assert COMMANDS[:2] == ["tools/demo", "tools/test"]
    for command in COMMANDS[:2]:
        assert (ROOT / command).stat().st_mode & 0o100


def test_every_command_is_either_ours_or_one_of_the_scripts():
    assert set(COMMANDS) - set(OF_VLM) == {"tools/demo", "tools/test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone's top as far as the commands see it: recipes, and a picture."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", OF_VLM)
def test_every_command_of_the_readme_runs(line, shrunk, folder, monkeypatch, capsys):
    """In the order of the page, each with the recipe made small."""
    monkeypatch.chdir(folder)
    words = shlex.split(line)[1:]
    if "recipes/scenes.yaml" in words:
        own = [word for word in words if "=" in word]
        small = [word for word in shrunk(Path("recipes/scenes.yaml")) if word.split("=")[0] not in str(own)]
        words += [*small, "evaluate.compare=[{}]"]
    if "picture.png" in words:
        from vlm.data.scenes.render import png
        from vlm.data.scenes.world import World, generator

        Path("picture.png").write_bytes(png(World("biased").draw(generator(0, "test", 0), "test")))
    assert main(words) == 0
    assert capsys.readouterr().out.strip() or words[:2] == ["data", "check"]  # silent when all is well


def test_the_error_it_shows_is_the_error_one_gets(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shown = re.search(r"```\nerror: (.*?)\.\.\.\n```", README, re.S)
    assert shown is not None
    assert main(["plan", "recipes/scenes.yaml", "stages.0.stpes=60"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {shown[1].strip()}")


def test_excerpts_stand_in_their_files():
    excerpts = re.findall(r"<!-- excerpt: (\S+) -->\n```yaml\n(.*?)```", README, re.S)
    assert excerpts
    for file, text in excerpts:
        assert text in (ROOT / file).read_text()


def test_the_table_of_methods_is_the_generated_one():
    import readme

    assert readme.replace_part(README, "methods", "end of methods", readme.methods_table()) == README


def test_the_table_of_kernels_is_the_generated_one():
    import readme

    assert readme.replace_part(README, "kernels", "end of kernels", readme.kernels_table()) == README
