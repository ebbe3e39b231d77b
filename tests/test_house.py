"""House rules no linter knows, checked on what git holds: names at the top, forbidden calls, size, no machine paths."""

import re
import subprocess
from pathlib import Path

import jaxtyping
import pytest
import torch

from vlm.kernels.grouped_mass import grouped_mass_attention

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"pyproject.toml", "README.md", "vlm", "models", "data", "kernels", "recipes", "tests", "tools"}
LONGEST = 500

# Each would let a file that someone was handed run code or load a model's own code, or (the fourth) switch attention
# to its slow path. Prose (.md) may speak of them, and tests may set the traps that the program must not step into.
FORBIDDEN = {
    "unpickling": r"\b(c?pickle|dill|joblib|marshal)\.(load|loads|Unpickler)\b",
    "unpickling under another name": r"from (c?pickle|dill|joblib|marshal) import (?!UnpicklingError\b)",
    "numpy's unpickling": r"allow_pickle\s*=\s*True",
    "attention maps of every layer": r"output_attentions[\"']?\s*[:=]\s*[Tt]rue",
    "the hub's own code": r"trust_remote_code[\"']?\s*[:=]\s*[Tt]rue",
    "a shell": r"\bshell\s*=\s*True|\bos\.(system|popen)\(",
    "running text as code": r"(?<![\w.])(eval|exec)\((?!\))",
    "yaml that builds objects": r"\byaml\.(unsafe_load|full_load|UnsafeLoader|FullLoader)\b",
    "weights loaded by unpickling": r"weights_only\s*=\s*False|from torch import .*\bload\b",
}
TORCH_LOAD = re.compile(r"\btorch\.load(\((?:[^()]|\([^()]*\))*\))?")

MACHINE = {
    "path of one machine": r"(?<![\w.\-])/(?:work|root|home|Users|opt|mnt|tmp/venv)/",
    "package registry": r"--(?:extra-)?index-url|\bpypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs",
    "private address": r"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b",
}


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    """Path from the root -> text, of every tracked text file."""
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:
            found[str(path.relative_to(ROOT))] = content.decode("utf-8")
    return found


def matches(pattern: str, text: str) -> list[str]:
    return [match.group() for match in re.finditer(pattern, text)]


def unsafe_torch_loads(text: str) -> list[str]:
    return [call.group() for call in TORCH_LOAD.finditer(text) if "weights_only=True" not in call.group()]


def test_the_names_at_the_top():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_calls(what: str):
    code = {name: text for name, text in texts().items() if not name.endswith(".md") and not name.startswith("tests/")}
    assert {name: found for name, text in code.items() if (found := matches(FORBIDDEN[what], text))} == {}


def test_torch_load_reads_weights_only():
    code = {name: text for name, text in texts().items() if name != "tests/test_house.py" and not name.endswith(".md")}
    assert {name: found for name, text in code.items() if (found := unsafe_torch_loads(text))} == {}


def test_pickle_stays_in_tests():
    code = {name: text for name, text in texts().items() if name.endswith(".py") and not name.startswith("tests/")}
    assert [name for name, text in code.items() if re.search(r"^\s*import (pickle|dill|joblib)", text, re.M)] == []


@pytest.mark.parametrize("what", MACHINE)
def test_no_trace_of_a_machine(what: str):
    assert {name: found for name, text in texts().items() if (found := matches(MACHINE[what], text))} == {}


def test_files_are_short_enough_to_read():
    lengths = {name: text.count("\n") for name, text in texts().items() if Path(name).suffix in {".py", ".md", ""}}
    own = {name: length for name, length in lengths.items() if not name.startswith("tests/")}
    assert {name: length for name, length in own.items() if length > LONGEST} == {}


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("unpickling", "pickle" + ".loads(data)"),
        ("unpickling under another name", "from pickle" + " import loads"),
        ("numpy's unpickling", "numpy.load(path, allow_pickle" + "=True)"),
        ("attention maps of every layer", "model(x, output_attentions" + "=True)"),
        ("attention maps of every layer", '{"output_attentions"' + ": True}"),
        ("the hub's own code", "trust_remote_code" + ": true"),
        ("a shell", "run(command, shell" + "=True)"),
        ("running text as code", "value = ev" + "al(text)"),
        ("yaml that builds objects", "yaml" + ".unsafe_load(text)"),
        ("weights loaded by unpickling", "weights_only" + "=False"),
    ],
)
def test_a_forbidden_call_is_recognised(what: str, line: str):
    assert matches(FORBIDDEN[what], line)


@pytest.mark.parametrize("line", ["model.eval()", "self.exec(x)", "def evaluate(x): ...", "shell = 'True'"])
def test_an_innocent_call_is_not(line: str):
    assert [what for what, pattern in FORBIDDEN.items() if matches(pattern, line)] == []


@pytest.mark.parametrize(
    ("call", "unsafe"),
    [
        ("torch.load(path, weights_only=True)", 0),
        ("torch.load(\n    open(path),\n    weights_only=True,\n)", 0),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=flag)", 1),
        ("partial(torch.load, path)", 1),
    ],
)
def test_torch_load_is_recognised(call: str, unsafe: int):
    assert len(unsafe_torch_loads(call)) == unsafe


@pytest.mark.parametrize("path", ["home/someone/x.pt", "opt/wheels/", "work/main"])
def test_a_machine_path_is_recognised(path: str):
    assert matches(MACHINE["path of one machine"], f"see /{path}")
    assert not matches(MACHINE["path of one machine"], f"see vlm/{path}")


def test_shapes_are_checked_in_tests():
    """The hook of conftest.py is on, through the links and for names shared between arguments (keys: 5 against 6)."""
    q, k, v = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="keys"):
        grouped_mass_attention(q, k, v, torch.zeros(1, 5, dtype=torch.long))
