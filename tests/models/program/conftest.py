"""The numbers of the published codes, and the inputs they belong to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


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
