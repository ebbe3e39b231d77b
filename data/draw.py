"""The luck of one place in the order: what may vary from epoch to epoch, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Draw:
    """Where a sample is being read, and a random generator that depends on the seed and this position alone.

    So an augmentation does not change with ranks, workers, micro-batches or a resume.
    """

    position: int
    epoch: int
    seed: int

    @cached_property
    def rng(self) -> np.random.Generator:
        """Seeded from (seed, position); always from its start in a new Draw."""
        return np.random.default_rng([self.seed, self.position])
