"""The one-off programs of tools/ run as the README prints them, made small."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_prefill_benchmark_writes_a_row_for_every_pruner_and_budget(tmp_path):
    out = tmp_path / "bench_prefill.md"
    small = ["--width", "32", "--layers", "4", "--repeats", "1", "--device", "cpu", "--threads", "1"]
    subprocess.run([sys.executable, "tools/bench_prefill.py", *small, "--out", out], cwd=ROOT, check=True)
    rows = [line.split(" | ")[0].strip("| ") for line in out.read_text().splitlines() if line.startswith("| ")]
    pruners = sorted(path.stem for path in (ROOT / "models/pruners").glob("*.py"))
    assert sorted(rows[1:]) == sorted(["none", *pruners, *pruners, *pruners])


def test_the_kernel_benchmark_compares_every_peer_and_writes_a_table(tmp_path):
    out = tmp_path / "bench_kernels.md"
    small = ["--only", "sigmoid", "--repeats", "1", "--device", "cpu", "--threads", "1", "--out", out]
    subprocess.run([sys.executable, "-m", "tools.bench_kernels", *small], cwd=ROOT, check=True)
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["peer", "(sdpa, softmax)", "flex", "torch", "reference"]
    assert all(float(row[1]) > 0 for row in rows[1:]), "a peer was wrong or did not run"


def test_every_tool_has_a_line_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    tools = [path.name for path in (ROOT / "tools").iterdir() if path.is_file() and not path.name.startswith("_")]
    assert [name for name in tools if name not in readme and name != "constraints.txt"] == []
