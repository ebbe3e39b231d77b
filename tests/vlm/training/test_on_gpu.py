"""Every strategy on the GPUs that are there, against one process: what of it a CPU cannot run.

Skipped without a GPU; ``tools/gpu`` runs it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.training import checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WORLD = max(world for world in (1, 2, 4, 8) if world <= max(1, torch.cuda.device_count()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    point = checkpoints.newest(folder / "checkpoints")
    assert point is not None
    return checkpoints.read(point.path)["state_dict"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_it_learns_what_one_process_learns(parallel: str, program: Any, tmp_path: Path) -> None:
    if parallel.startswith("zero"):
        pytest.importorskip("deepspeed", exc_type=ImportError)
    for to, how in (("one", "single"), ("many", parallel)):
        devices = f"run.devices={WORLD if to == 'many' else 1}"
        process = program(f"run.parallel={how}", devices, "run.micro_batch=1", "stages.1.clip=0.05", to=to)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    found, expected = weights(tmp_path / "many"), weights(tmp_path / "one")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
