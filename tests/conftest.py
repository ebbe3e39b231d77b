"""What holds for every test: one thread, a fixed seed, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; test subprocesses inherit all three
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
