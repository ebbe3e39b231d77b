"""Random keywords of attention, and who sees whom by them, one pair after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def draw_common() -> Callable[..., dict[str, Any]]:
    """Of every kind of keyword some: lengths (0 too), positions that repeat and skip, documents, hidden keys."""

    def draw(seed: int, batch: int, rows: int, keys: int, kinds: tuple[str, ...]) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        integers = lambda high, *shape: torch.randint(0, high, shape, generator=g)  # noqa: E731
        common: dict[str, Any] = {"causal": "full" not in kinds}
        if "q_len" in kinds:
            common["q_len"] = integers(rows + 1, batch)
        if "k_len" in kinds:
            common["k_len"] = integers(keys + 1, batch)
        if "hidden" in kinds:
            common["key_valid"] = integers(3, batch, keys) > 0
        if "positions" in kinds:
            common |= {"q_pos": integers(2 * keys + 1, batch, rows) - 2, "k_pos": integers(2 * keys + 1, batch, keys)}
        if "documents" in kinds:
            common |= {"q_doc": integers(3, batch, rows), "k_doc": integers(3, batch, keys)}
        return common

    return draw


@pytest.fixture(scope="session")
def sees() -> Callable[..., Tensor]:
    """[batch, rows, keys]: the sentences of ``Common`` for one row and one key at a time."""

    def every(common: dict[str, Any], batch: int, rows: int, keys: int) -> Tensor:
        return torch.tensor(
            [[[one(common, b, i, j, rows, keys) for j in range(keys)] for i in range(rows)] for b in range(batch)]
        ).reshape(batch, rows, keys)

    def one(common: dict[str, Any], b: int, i: int, j: int, rows: int, keys: int) -> bool:
        q_len = int(common["q_len"][b]) if "q_len" in common else rows
        k_len = int(common["k_len"][b]) if "k_len" in common else keys
        if i >= q_len or j >= k_len:
            return False
        if "key_valid" in common and not common["key_valid"][b, j]:
            return False
        if "q_doc" in common and common["q_doc"][b, i] != common["k_doc"][b, j]:
            return False
        if not common["causal"]:
            return True
        if "q_pos" in common:
            return bool(common["k_pos"][b, j] <= common["q_pos"][b, i])
        return j <= i + k_len - q_len

    return every
