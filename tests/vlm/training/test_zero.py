"""ZeRO without a GPU: its configuration by DeepSpeed's own rules where DeepSpeed is installed, and its refusals."""

from typing import Any

import pytest
import torch

from vlm.recipe.schema import Run
from vlm.training.errors import TrainingError
from vlm.training.zero import zero_config


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is told where there is no GPU")
@pytest.mark.parametrize("parallel", ["zero1", "zero2", "zero3"])
def test_without_a_gpu_it_is_refused_in_one_line(parallel: str, train: Any) -> None:
    with pytest.raises(TrainingError, match=f"run.parallel: {parallel} needs CUDA GPUs.*use fsdp2") as error:
        train(f"run.parallel={parallel}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configuration_is_one_that_deepspeed_takes(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", exc_type=ImportError)
    from deepspeed.runtime.config import DeepSpeedConfig

    run = Run.model_validate({"dir": "x", "parallel": f"zero{stage}", "micro_batch": 2})
    config = zero_config(run)
    found = DeepSpeedConfig(config)
    assert found.zero_optimization_stage == stage
    assert found.train_micro_batch_size_per_gpu == 2
    assert not found.bfloat16_config.enabled and not found.float16_config.enabled
    known = type(found.zero_config).model_fields
    aliases = {field.alias for field in known.values()}
    assert {*config["zero_optimization"]} <= {*known} | aliases


def test_lightning_makes_no_other_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    from vlm.training.zero import Zero

    run = Run.model_validate({"dir": "x", "parallel": "zero2"})
    assert Zero(config=zero_config(run)).config == zero_config(run)
