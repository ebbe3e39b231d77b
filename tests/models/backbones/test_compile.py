"""Every family compiles: a whole encoder is traced into one graph, without a break, with its tokens and gradients.

What each backend shows: ``eager`` runs the graph of TorchDynamo as it is; ``aot_eager`` also traces the backward pass
and takes both apart into the operations that code is made of; ``inductor`` makes the code, which takes minutes for most
families on a CPU, so one goes through it. Those whose tables follow from the size of the picture are asked about
another size too.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_contract import TINY

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("compiled.py")
SMALL = ("biformer", "dependencyvit", "lightnet", "litv2", "nat", "sparsifiner")  # whose graphs are soon taken apart


def compiled(*asked):
    run = subprocess.run([sys.executable, str(PROGRAM), *asked], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def traced():
    return compiled("eager:layers", *(f"{'aot_eager' if name in SMALL else 'eager'}:{name}" for name in TINY))


@pytest.mark.parametrize("name", TINY)
def test_a_family_is_one_graph_that_gives_the_same(name, traced):
    told = traced[name]
    assert (told["graphs"], told["recompiled"], told["breaks"]) == (1, 0, [])
    assert told["tokens"] < 1e-6 and told["gradients"] < 1e-5 and told.get("resized", 0) < 1e-6


def test_sizes_that_the_compiler_left_open_are_settled_by_the_tables(traced):
    assert traced["layers"]["breaks"] == [] and traced["layers"]["resized"] < 1e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_family_through_inductor():
    told = compiled("inductor:dependencyvit")["dependencyvit"]
    assert (told["graphs"], told["breaks"]) == (1, []) and max(told["tokens"], told["gradients"]) < 1e-4
