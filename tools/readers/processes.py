"""Functions run in processes of their own, forked from one that has imported everything and started nothing.

So a pass finds no cache, thread or shared memory of an earlier one, and a crash or a hang is a result like any other.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist


class Failure(NamedTuple):
    """What a process ended with instead of a value."""

    kind: str
    message: str


def alone(function: Callable[..., Any], *arguments: Any, log: Path, seconds: float = 120.0) -> Any:
    """The value of one call, or its Failure."""
    return ranks([(function, arguments)], log=log, seconds=seconds)[0]


def ranks(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], log: Path, seconds: float = 120.0) -> list[Any]:
    """The values or Failures of calls made at once, each a rank of a world of as many."""
    context, port = get_context("fork"), _free_port()
    started = []
    for rank, (function, arguments) in enumerate(calls):
        theirs, ours = context.Pipe()
        place = (rank, len(calls), port, log, theirs)
        process = context.Process(target=_child, args=(place, function, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    until = time.monotonic() + seconds
    values: list[Any] = []
    for _, ours in started:
        try:
            told = ours.poll(max(0.0, until - time.monotonic()))
            values.append(ours.recv() if told else Failure("Timeout", f"no end within {seconds:g} s"))
        except EOFError:
            values.append(Failure("Died", "the process ended without a word"))
    for process, _ in started:
        process.join(5)
        if process.is_alive():  # a thread or a barrier of its own keeps it
            process.kill()
            process.join()
    return values


def _child(place: tuple[int, int, int, Path, Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    rank, world, port, log, pipe = place
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    here = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_WORLD_SIZE": world, "LOCAL_RANK": rank, "GLOBAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in here.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    if world > 1:
        dist.init_process_group("gloo")
    try:
        value = function(*arguments)
    except BaseException as error:  # whatever a reader raises is what is to be told
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        value = Failure(type(error).__name__, lines[-1] if lines else "")
    gc.collect()
    pipe.send(value)
    pipe.close()
    if world > 1:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
