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


@pytest.mark.slow
def test_the_backbone_benchmark_sets_each_of_ours_beside_one_of_timm(tmp_path):
    out = tmp_path / "bench_backbones.md"
    small = ["--only", "lightnet", "--repeats", "1", "--batch", "1", "--device", "cpu"]
    subprocess.run([sys.executable, "tools/bench_backbones.py", *small, "--out", out], cwd=ROOT, check=True)
    rows = [line for line in out.read_text().splitlines() if line.startswith("| lightnet tiny | 224 | 6.0 |")]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert len(rows) == 1 and len(cells) == 10
    assert float(cells[4]) > 1.0 and abs(float(cells[6]) - 6.0) < 1.0  # MiB; a peer of its size


@pytest.mark.slow
def test_memory_is_what_lives_at_once():
    code = (
        "import sys, torch; sys.path.insert(0, 'tools'); from bench_backbones import LiveBytes\n"
        "with LiveBytes() as live:\n"
        "    a = torch.zeros(1000); b = a + 1; c = b[:500]; del a; d = b * 2; del b; e = d.add_(1)\n"
        "print(live.most, live.now)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["8000", "8000"]  # two of a thousand numbers; c keeps the storage of b


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


@pytest.mark.slow
def test_the_reader_benchmark_marks_absent_peers_and_finds_our_resume_exact(tmp_path):
    out = tmp_path / "bench_data.md"
    small = ["--samples", "96", "--decoded", "64", "--batch", "8", "--workers", "0", "--repeats", "1"]
    small += ["--decoded-repeats", "1", "--only", "webdataset", "--work", tmp_path / "work", "--out", out]
    subprocess.run([sys.executable, "-m", "tools.bench_data", *small], cwd=ROOT, check=True, capture_output=True)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in out.read_text().splitlines() if "|" in line
    ]
    speeds = {(row[0], row[2]): row[3] for row in rows if row[0] in ("raw", "decoded")}
    for images in ("raw", "decoded"):
        assert float(speeds[images, "ours"]) > 0 and float(speeds[images, "webdataset"]) > 0
        assert speeds[images, "litdata"].startswith("not ") and speeds[images, "mosaicml-streaming"].startswith("not ")
    can = {row[0]: row[1:] for row in rows if len(row) == 5}
    for name in ("1 rank to 2", "2 ranks to 1", "2 workers to 3"):
        assert can[f"resume: {name}"][:2] == ["exact", "nothing to save"]
        assert can[f"resume of a mixture: {name}"][0] == "exact"
    assert can["a destroyed image"][0] == "191 of 192 read, 1 counted as skipped"
    assert can["a saved state over other data"][0] == "noticed on resuming (DataError)"
    assert can["reads http"][0] == "192 of 192 samples"
