"""The numbers of the published codes, and the inputs they belong to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor


def from_hash(seed: int, *shape: int) -> Tensor:
    """Numbers in [0, 1) made by an integer hash, so that they are the same everywhere."""
    h = (2654435761 * numpy.arange(numpy.prod(shape), dtype=numpy.uint64) + 1013904223 * seed) % 2**32
    for multiplier, shift in ((1, 16), (2246822519, 13), (3266489917, 16)):
        h = h * numpy.uint64(multiplier) % 2**32
        h ^= h >> numpy.uint64(shift)
    return torch.from_numpy((h / 2**32).astype(numpy.float32)).reshape(shape)


@pytest.fixture(scope="session")
def positive() -> Callable[..., Tensor]:
    """``positive(seed, *shape)``: numbers in [0, 1)."""
    return from_hash


@pytest.fixture(scope="session")
def signed() -> Callable[..., Tensor]:
    """``signed(seed, *shape)``: numbers in [-1, 1)."""
    return lambda seed, *shape: 2 * from_hash(seed, *shape) - 1


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What the authors' codes return on those inputs (CPU, single precision)."""
    path = Path(__file__).parents[2] / "golden" / "pruners.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def padded() -> Callable[..., tuple[list[Tensor], Tensor]]:
    """``padded(seed, lengths, *tensors)``: segments of ``lengths[s]`` tokens spread over one row more than needed.

    Each tensor is [segments, longest, ...]; its first ``lengths[s]`` tokens are kept, in order, with noise between.
    """

    def spread(seed: int, lengths: list[int], *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
        g = torch.Generator().manual_seed(seed)
        width = max(lengths) + 3
        valid = torch.zeros(len(lengths), width, dtype=torch.bool)
        for s, n in enumerate(lengths):
            valid[s, torch.randperm(width, generator=g)[:n]] = True
        wide = []
        for tensor in tensors:
            noise = 5 * torch.rand(len(lengths), width, *tensor.shape[2:], generator=g).to(tensor.dtype)
            for s, n in enumerate(lengths):
                noise[s, valid[s]] = tensor[s, :n]
            wide.append(noise)
        return wide, valid

    return spread


@pytest.fixture(scope="session")
def padded_case() -> Callable[[int, list[int]], tuple[Tensor, Tensor, Tensor]]:
    """``padded_case(seed, lengths)``: features of width 4, positive scores, and which tokens are there."""

    def make(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        width = max(lengths) + 3
        valid = torch.zeros(len(lengths), width, dtype=torch.bool)
        for s, n in enumerate(lengths):
            valid[s, torch.randperm(width, generator=g)[:n]] = True
        x, score = torch.randn(len(lengths), width, 4, generator=g), torch.rand(len(lengths), width, generator=g)
        return torch.where(valid[..., None], x, 9 * x), torch.where(valid, score, 9.0), valid

    return make
