"""Which process of a launch this one is."""

import os

# Set in every process by a launcher from outside; Lightning's own launcher starts the others after the data are made.
OUTSIDE_RANKS = ("RANK", "SLURM_PROCID")


def is_first_rank() -> bool:
    """Whether this process is the first of its launch: torchrun's, SLURM's, or Lightning's own on one machine."""
    return next((int(os.environ[name]) for name in (*OUTSIDE_RANKS, "LOCAL_RANK") if name in os.environ), 0) == 0
