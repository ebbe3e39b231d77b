"""Scenes made once, a recipe of two short stages over them, and runs of it: in this process or as a program."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vlm.data.scenes.make import make
from vlm.recipe import load_recipe
from vlm.run import run

RECIPE = """
name: tiny
seed: 3
model:
  vision: {{use: conv_vit, image: 48, dim: 16, depth: 1, heads: 2}}
  connector: {{use: mlp, depth: 2}}
  language:
    config:
      model_type: llama
      hidden_size: 16
      intermediate_size: 32
      num_hidden_layers: 2
      num_attention_heads: 2
      num_key_value_heads: 2
      max_position_embeddings: 128
    tokenizer: {scenes}/tokenizer
data:
  workers: 0
  sources:
    scenes: {{shards: {scenes}/train}}
stages:
  - tags:
      objective: tags
      mix: {{scenes: 1}}
      train: {{vision: {{lr: 1e-2, weight_decay: 0.01}}}}
      schedule: {{warmup: 2}}
      steps: 6
  - sft:
      mix: {{scenes: 1}}
      train:
        connector: {{lr: 1e-2, weight_decay: 0.01}}
        language: {{lr: 1e-2, weight_decay: 0.01}}
      drop_image: 25%
      schedule: {{warmup: 20%}}
      steps: 10
run:
  dir: {folder}
  global_batch: 8
  log_every: 1
  threads: 1
  trace_samples: true
  save: {{every: 4, keep: 10}}
"""

Train = Callable[..., Path]
Ranks = Callable[..., "Processes"]
Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Scenes data set."""
    return make(tmp_path_factory.mktemp("data") / "scenes", train=200, test=12, seed=0)


@pytest.fixture(scope="session")
def written(scenes: Path) -> Callable[[Path], Path]:
    """``written(folder)`` writes the recipe there, with ``folder / "run"`` as its run folder, and returns its file."""

    def call(folder: Path) -> Path:
        path = folder / "recipe.yaml"
        path.write_text(RECIPE.format(scenes=scenes, folder=folder / "run"))
        return path

    return call


@pytest.fixture
def recipe(written: Callable[[Path], Path], tmp_path: Path) -> Path:
    """The recipe's file; its run folder is ``tmp_path / "run"``."""
    return written(tmp_path)


@pytest.fixture
def train(recipe: Path, tmp_path: Path) -> Train:
    """``train("seed=4", to="name")`` trains in this process, in the run folder ``name``, and returns that folder."""

    def call(*overrides: str, to: str = "run") -> Path:
        folder = tmp_path / to
        run(load_recipe(recipe, [*overrides, f"run.dir={folder}"]), ("data", "train"))
        return folder

    return call


@pytest.fixture
def program(recipe: Path, tmp_path: Path) -> Iterator[Program]:
    """``program("seed=4", to="name")`` starts ``vlm train``, the leader of a process group that the test may kill.

    With ``script=file`` it starts that file instead, with the recipe and its overrides as arguments.
    """
    started: list[subprocess.Popen[str]] = []

    def call(*overrides: str, to: str = "run", script: Path | None = None) -> "subprocess.Popen[str]":
        command = [str(script)] if script else ["-m", "vlm", "train"]
        process = subprocess.Popen(
            [sys.executable, *command, str(recipe), *overrides, f"run.dir={tmp_path / to}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Processes(NamedTuple):
    """Ranks of one run. ``join`` waits for all and gives their exit codes; None is one that still ran after 60 s."""

    processes: list[Any]
    logs: list[Path]

    def join(self, seconds: float = 60) -> list[int | None]:
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


@pytest.fixture(scope="session")
def fork_server() -> Any:
    """Processes start in a moment from a server that has imported what they need and used none of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm.run", "vlm.training.train", "vlm.objectives.tags", "vlm.objectives.chat"])
    return context


@pytest.fixture
def ranks(recipe: Path, tmp_path: Path, fork_server: Any) -> Iterator[Ranks]:
    """``ranks(2, "seed=4", to="name", change="...")`` starts that many gloo processes of ``vlm train``, or of another
    ``command``.

    They are started as a cluster would: one process per rank, told by environment variables.
    """
    started: list[Processes] = []

    def call(world: int, *overrides: str, to: str = "run", change: str = "", command: str = "train") -> Processes:
        devices = [f"run.devices={world}", f"run.parallel={'ddp' if world > 1 else 'single'}"]
        arguments = [command, str(recipe), *devices, *overrides, f"run.dir={tmp_path / to}"]
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        logs = [tmp_path / f"{to}-rank{rank}.log" for rank in range(world)]
        processes = []
        for rank in range(world):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            given = {"environment": environment, "log": str(logs[rank]), "change": change, "arguments": arguments}
            script = str(Path(__file__).with_name("rank.py"))
            processes.append(fork_server.Process(target=runpy.run_path, args=(script, given, "rank")))
            processes[-1].start()
        started.append(Processes(processes, logs))
        return started[-1]

    yield call
    for group in started:
        group.kill()
        group.join(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
