"""tools/soak.py: its short form passes, and its verdict is not always yes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.soak import Failed, Run
from vlm.data.scenes.make import make

ROOT = Path(__file__).parent.parent
KINDS = ("kill all", "kill one", "terminate all", "terminate one", "disk full", "file limit", "rot", "server")


@pytest.mark.slow
def test_a_run_survives_one_fault_of_every_kind():
    command = [sys.executable, "tools/soak.py", "--minutes", "0", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(.+?) +injected +(\d+)  survived +(\d+)$", done.stdout, re.MULTILINE)
    assert all(int(injected) == int(survived) > 0 for _, injected, survived in counts)
    for kind in KINDS:
        assert any(name.startswith(kind) for name, _, _ in counts), kind


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of two steps that consumed samples a, b, then c, d, of which b was rotten from the beginning."""
    made = make(tmp_path / "scenes", train=4, test=2, seed=0)
    run = Run(tmp_path / "round", made / "train")
    run.rotten, run.first_rotten = {"b", "d"}, {"b"}
    write(run.folder, [["a", "b"], ["c", "d"]], [1, 0])
    write(tmp_path / "undisturbed", [["a", "b"], ["c", "d"]], [0, 0])
    return run


def write(folder: Path, steps: list[list[str]], skipped: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    traced = [{"stage": 0, "step": step, "ids": ids} for step, ids in enumerate(steps)]
    logged = [{"stage": 0, "step": step, **({"skipped": n} if n else {})} for step, n in enumerate(skipped)]
    for name, lines in (("samples.jsonl", traced), ("metrics.jsonl", logged)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("steps", "skipped", "wrong"),
    [
        ([["a", "b"], ["c", "d"]], [1, 0], ""),
        ([["a", "b"], ["c", "d"]], [1, 1], ""),  # d rotted at some time
        ([["a", "b"], ["c", "c"]], [1, 0], r"lost: .*'d'.*repeated: .*'c'"),
        ([["a", "b"]], [1], "lost"),
        ([["c", "d"], ["a", "b"]], [1, 0], "not step by step"),
        ([["a", "b"], ["c", "d"]], [0, 0], "step 0: 0 skips, expected 1 to 1"),
        ([["a", "b"], ["c", "d"]], [1, 2], "step 1: 2 skips, expected 0 to 1"),
    ],
)
def test_the_end_is_held_against_the_undisturbed_run(
    steps: list[list[str]], skipped: list[int], wrong: str, run: Run, tmp_path: Path
):
    write(run.folder, steps, skipped)
    if wrong:
        with pytest.raises(Failed, match=wrong):
            run.check_end(tmp_path / "undisturbed")
    else:
        run.check_end(tmp_path / "undisturbed")


def test_lives_must_end_as_their_fault_wants(run: Run):
    log = run.recipe.with_name("rank0.log")
    log.write_text("error: checkpoint x could not be written: No space left on device; there is none before it\n")
    assert run.judge("disk full", [2, 1], set())
    assert run.judge("kill one", [-9, 1], {0})
    for fault, codes, hit in (
        ("kill one", [-9, None], {0}),  # the other hangs
        ("kill one", [-9, 0], {0}),  # the other takes it for the end
        ("terminate all", [0, 0], {0, 1}),  # and nothing was saved
        ("", [1], set()),
    ):
        with pytest.raises(Failed):
            run.judge(fault, codes, hit)
    log.write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
    with pytest.raises(Failed, match="not the end that it must have"):
        run.judge("disk full", [1], set())
