"""What holds for every test: one thread, a fixed seed, no network, and tensor shapes checked at run time.

The shape check holds each call of ours against the jaxtyping annotations of its signature (a test process only; a
program that a test starts runs without). Shapes alone are checked: other annotations are the type checker's matter.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; programs that tests start inherit all three
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import inspect
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import jaxtyping
import numpy
import pytest
import torch
from beartype import beartype

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; on a GPU kernels run as compiled


def keep_kernels_as_written() -> None:
    """Triton reads the source of a kernel, so it must get the function itself and not one that checks shapes."""
    if find_spec("triton") is None:
        return
    import triton

    jit = triton.jit

    def jit_unwrapped(function: Callable | None = None, **options: Any) -> Any:
        if function is None:
            return lambda function: jit(inspect.unwrap(function), **options)
        return jit(inspect.unwrap(function), **options)

    triton.jit = jit_unwrapped


keep_kernels_as_written()


def names_a_shape(hint: Any) -> bool:
    """Whether an annotation is an array of jaxtyping, or holds one (`tuple[Float[...], ...]`, `Float[...] | None`)."""
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(names_a_shape, get_args(hint)))


def check_shapes(function: Callable) -> Callable:
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if names_a_shape(hint)}
    return beartype(function)


# from here on: tests import our modules only after this file
jaxtyping.config.update("jaxtyping_remove_typechecker_stack", True)  # a failure shows our frames, not the checker's
jaxtyping.install_import_hook("vlm", f"{__name__}.check_shapes")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unchecked_shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test marked `bad_shape` breaks a shape on purpose, to see the function's own error and not the checker's."""
    if request.node.get_closest_marker("bad_shape"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def shrunk() -> Callable[[Path], list[str]]:
    """Overrides that leave every part of a shipped recipe in place but make each as small as can be."""
    from vlm.recipe import load_recipe

    def overrides(path: Path) -> list[str]:
        recipe = load_recipe(path)
        small = ["data.make.train=150", "data.make.test=12", "run.global_batch=6", "run.trace_samples=true"]
        small += ["run.save.every=2", "run.log_every=2", "evaluate.batch=16", "evaluate.pictures=2"]
        for number, stage in enumerate(recipe.stages):
            small += [f"stages.{number}.steps=4", f"stages.{number}.schedule.warmup=1"]
            small += [f"stages.{number}.global_batch=6"] if stage.global_batch else []
        return small + [f"evaluate.benchmarks.{label}.limit=6" for label in recipe.evaluate.benchmarks]

    return overrides
