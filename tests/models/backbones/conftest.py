"""Published numbers: weights and inputs that are functions of a name and a seed, and what the authors' code makes."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "golden" / "backbones"


def _weights(key: str, value: Tensor, gain: float, small: float) -> Tensor:
    n = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(value.shape))
    if key.endswith("running_var"):
        n = 1 + 0.1 * abs(n)
    elif key.endswith("running_mean"):
        n = 0.1 * n
    elif value.ndim <= 1 and key.endswith("weight"):
        n = 1 + 0.1 * n
    else:
        n = n * gain / math.sqrt(math.prod(value.shape[1:])) if value.ndim > 1 else small * n
    return torch.tensor(n, dtype=torch.float32)


@pytest.fixture(scope="session")
def filled() -> Callable[..., Any]:
    """``filled(module)``: the module in eval mode with the weights that every golden output was made with.

    gain, small: deviation of matrices times the root of their inputs, and of biases; networks of spikes have others.
    """

    def fill(module: nn.Module, gain: float = 0.7, small: float = 0.05) -> nn.Module:
        state = {
            key: _weights(key, value, gain, small)
            for key, value in module.state_dict().items()
            if value.is_floating_point()
        }
        module.load_state_dict(state, strict=False)
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Tensor]:
    """``drawn(seed, *shape)``: an input of the golden outputs."""
    return lambda seed, *shape: torch.tensor(
        numpy.random.Generator(numpy.random.PCG64(seed)).standard_normal(shape), dtype=torch.float32
    )


@pytest.fixture(scope="session")
def official() -> Callable[..., Tensor]:
    """``official(name)``: what the authors' module of that name returns; ``entry`` names one of several results."""

    def read(name: str, entry: str | None = None) -> Tensor:
        with numpy.load(FOLDER / f"{name}.npz") as file:
            return torch.tensor(file[entry or ("logits" if "logits" in file else "out")])

    return read


@pytest.fixture(scope="session")
def off(official: Callable[..., Tensor]) -> Callable[..., float]:
    """``off(found, name, entry)``: the largest difference from the golden, in its standard deviations."""

    def largest(found: Tensor, name: str, entry: str | None = None) -> float:
        golden = official(name, entry)
        assert found.shape == golden.shape
        return float((found.detach() - golden).abs().max() / golden.std())

    return largest


@pytest.fixture(scope="session")
def published() -> Callable[[str], tuple[int, dict[str, tuple[str, str]]]]:
    """``published(name)``: parameters of the authors' module, and shape and type of each entry of its state dict."""

    def read(name: str) -> tuple[int, dict[str, tuple[str, str]]]:
        first, *rest = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        count = int(first.split("params=")[1].split()[0])
        return count, {key: (shape, kind) for key, shape, kind in (line.split("\t") for line in rest)}

    return read


@pytest.fixture(scope="session")
def entries() -> Callable[[nn.Module], tuple[int, dict[str, tuple[str, str]]]]:
    """``entries(module)``: of a module of ours what ``published`` says of the authors'."""

    def of(module: nn.Module) -> tuple[int, dict[str, tuple[str, str]]]:
        state = module.state_dict().items()
        shapes = {key: (str(list(value.shape)), str(value.dtype).removeprefix("torch.")) for key, value in state}
        return sum(parameter.numel() for parameter in module.parameters()), shapes

    return of
