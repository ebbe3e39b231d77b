"""Published numbers: weights and inputs that are functions of a name and a seed, and what the authors' code makes."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "golden" / "backbones"


def _weights(key: str, value: Tensor) -> Tensor:
    n = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(value.shape))
    if key.endswith("running_var"):
        n = 1 + 0.1 * abs(n)
    elif key.endswith("running_mean"):
        n = 0.1 * n
    elif value.ndim <= 1 and key.endswith("weight"):
        n = 1 + 0.1 * n
    else:
        n = n * 0.7 / math.sqrt(math.prod(value.shape[1:])) if value.ndim > 1 else 0.05 * n
    return torch.tensor(n, dtype=torch.float32)


@pytest.fixture(scope="session")
def filled() -> Callable[[nn.Module], nn.Module]:
    """``filled(module)``: the module in eval mode with the weights that every golden output was made with."""

    def fill(module: nn.Module) -> nn.Module:
        state = {key: _weights(key, value) for key, value in module.state_dict().items() if value.is_floating_point()}
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
def official() -> Callable[[str], Tensor]:
    """``official(name)``: what the authors' module of that name returns."""

    def read(name: str) -> Tensor:
        with numpy.load(FOLDER / f"{name}.npz") as file:
            return torch.tensor(file["logits" if "logits" in file else "out"])

    return read


@pytest.fixture(scope="session")
def published() -> Callable[[str], tuple[int, dict[str, tuple[str, str]]]]:
    """``published(name)``: parameters of the authors' module, and shape and type of each entry of its state dict."""

    def read(name: str) -> tuple[int, dict[str, tuple[str, str]]]:
        first, *rest = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        count = int(first.split("params=")[1].split()[0])
        return count, {key: (shape, kind) for key, shape, kind in (line.split("\t") for line in rest)}

    return read
