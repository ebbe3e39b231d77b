"""Runs in shards (FSDP2, two gloo processes): they learn what one process learns, and other kinds of runs go on from
their checkpoints. Gradients, ranks without images and losses that are not finite: test_module.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.training import checkpoints

FSDP2 = "run.parallel=fsdp2"
TIGHT = "stages.1.clip=0.05"  # below every norm of the tiny recipe, so that each step is scaled
LORA = "stages.1.train={connector: {lr: 1e-2}, language: {lora: 4, lr: 1e-2}}"
FASTV = "prune={use: fastv, layer: 1, keep: 25%}"


def final(folder: Path) -> dict[str, Any]:
    point = checkpoints.newest(folder / "checkpoints")
    assert point is not None
    return checkpoints.read(point.path)


def trained(ranks: Any, tmp_path: Path, *overrides: str, to: str = "run", world: int = 2) -> dict[str, Any]:
    group = ranks(world, "run.micro_batch=2", *overrides, to=to)
    assert group.join() == [0] * world, group.output()
    return final(tmp_path / to)


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, and the optimizer's moments of the same parameters in the same order."""
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], atol=1e-5, rtol=1e-5)
    [ours], [theirs] = found["optimizer_states"], expected["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, moments in theirs["state"].items():
        torch.testing.assert_close(ours["state"][number], moments, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", [(TIGHT,), (TIGHT, LORA)], ids=["weights", "lora"])
def test_two_shards_end_with_the_weights_of_one_process(how: Any, train: Any, ranks: Any, tmp_path: Path) -> None:
    expected = final(train(*how, to="one"))
    found = trained(ranks, tmp_path, FSDP2, *how)
    assert_alike(found, expected)
    assert (tmp_path / "run/samples.jsonl").read_text() == (tmp_path / "one/samples.jsonl").read_text()
    loose = final(train(*how[1:], to="loose"))["state_dict"]
    assert any((loose[name] - value).abs().max() > 1e-3 for name, value in expected["state_dict"].items())


def test_under_a_pruner(train: Any, ranks: Any, tmp_path: Path) -> None:
    expected = final(train(FASTV, to="one"))
    assert_alike(trained(ranks, tmp_path, FSDP2, FASTV), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "ddp"), (2, "fsdp2")),
        ((2, "fsdp2"), (2, "ddp")),
        ((2, "fsdp2"), (1, "single")),
        ((1, "single"), (2, "fsdp2")),
    ],
    ids=str,
)
def test_a_run_goes_on_under_another_strategy(before: Any, after: Any, train: Any, ranks: Any, tmp_path: Path) -> None:
    whole = final(train(to="whole"))
    trained(ranks, tmp_path, f"run.parallel={before[1]}", world=before[0])
    folder = tmp_path / "run/checkpoints"
    for late in ("stage1-sft-step00000008.ckpt", "stage1-sft-step00000010.ckpt"):
        (folder / late).unlink()
    found = trained(ranks, tmp_path, f"run.parallel={after[1]}", world=after[0])
    assert_alike(found, whole)
    assert (tmp_path / "run/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


def test_resuming_in_the_same_shards_is_exact_to_the_bit(ranks: Any, tmp_path: Path) -> None:
    whole = trained(ranks, tmp_path, FSDP2)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for late in ("stage1-sft-step00000008.ckpt", "stage1-sft-step00000010.ckpt"):
        (tmp_path / "again/checkpoints" / late).unlink()
    again = trained(ranks, tmp_path, FSDP2, to="again")
    torch.testing.assert_close(again["state_dict"], whole["state_dict"], atol=0, rtol=0)
