"""Ranks of a launch share the questions of an evaluation: each answers some, and the result is that of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

ASK = """
evaluate:
  batch: 3
  benchmarks:
    pope: {{images: {scenes}/test, questions: [{scenes}/benchmarks/pope_random.json], limit: 11}}
    chair: {{images: {scenes}/test, truth: {scenes}/benchmarks/chair.json, synonyms: {scenes}/benchmarks/synonyms.txt,
      max_new_tokens: 8, limit: 7}}
  compare:
    - {{}}
    - {{prune: {{use: fastv, keep: 50%, layer: 1}}, mitigate: {{use: zerotuning, calibration: auto}}}}
  during: {{every: 5, limit: 5}}
"""
# Each rank tells which batches it answered.
TOLD = """
from vlm.evaluation.answer import Asker
answer = Asker.answer

def told(self, prompts):
    print("answered", len(prompts), flush=True)
    return answer(self, prompts)

Asker.answer = told
"""
BROKEN = """
import os
from vlm.evaluation.answer import Asker
answer = Asker.answer

def broken(self, prompts):
    if os.environ["RANK"] == "1":
        raise OSError("the picture server is gone")
    return answer(self, prompts)

Asker.answer = broken
"""


@pytest.fixture
def asked(recipe: Path, scenes: Path) -> Path:
    recipe.write_text(recipe.read_text() + ASK.format(scenes=scenes))
    return recipe


def judged(folder: Path) -> tuple[list[Any], list[Any]]:
    """Metrics and changes of every result, and what was found while training."""
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [(r["label"], r["metrics"], r["change"]) for r in results], [(d["step"], d["metrics"]) for d in lines]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(asked: Path, ranks: Any, tmp_path: Path) -> None:
    micro = "run.micro_batch=4"
    one = ranks(1, micro, to="one", command="run")
    assert one.join() == [0], one.output()
    two = ranks(2, micro, to="two", command="run", change=TOLD)
    assert two.join() == [0, 0], two.output()
    assert judged(tmp_path / "two") == judged(tmp_path / "one")
    counts = [log.read_text().count("answered") for log in two.logs]
    assert min(counts) > 0.6 * max(counts)
    assert (tmp_path / "two/report.html").exists()

    again = ranks(2, micro, to="two", command="evaluate")  # nothing is trained, so they meet for this
    assert again.join() == [0, 0], again.output()
    assert judged(tmp_path / "two") == judged(tmp_path / "one")


def test_a_rank_that_fails_leaves_nobody_waiting(asked: Path, ranks: Any, tmp_path: Path) -> None:
    trained = ranks(1, "evaluate.during=null")
    assert trained.join() == [0], trained.output()
    group = ranks(2, "evaluate.during=null", command="evaluate", change=BROKEN)
    codes = group.join()
    assert None not in codes and 0 not in codes, group.output()
    assert "rank 1: OSError: the picture server is gone" in group.logs[0].read_text()
    assert not (tmp_path / "run/evaluation.json").exists()
