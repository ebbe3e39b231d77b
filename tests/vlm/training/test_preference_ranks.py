"""Stages of pairs on two gloo processes, whole weights (DDP) or shards (FSDP2), learn what one process learns; and a
whole model of Hugging Face learns from pairs and resumes to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.data.write import write_shards
from vlm.recipe import load_recipe
from vlm.run import run
from vlm.training import checkpoints

STAGE = "stages=[{name: dpo, mix: {pairs: 1}, steps: 4, train: {language: {lr: 1e-2, %s}}, objective: {use: dpo, %s}}]"
KINDS = {"start": STAGE % ("weight_decay: 0", "reference: start"), "adapter": STAGE % ("lora: 2", "reference: adapter")}


def final(folder: Path) -> dict[str, Any]:
    point = checkpoints.newest(folder / "checkpoints")
    assert point is not None
    return checkpoints.read(point.path)["state_dict"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(
    kind: str, parallel: str, train: Any, ranks: Any, stand_ins: Path, tmp_path: Path
) -> None:
    words = [KINDS[kind], f"data.sources={{pairs: {{shards: {stand_ins / 'pairs'}}}}}"]
    train(*words, to="one")
    group = ranks(2, f"run.parallel={parallel}", "run.micro_batch=2", *words, to="two")
    assert group.join() == [0, 0], group.output()
    expected, found = final(tmp_path / "one"), final(tmp_path / "two")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    whole, split = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert whole[0]["loss"] == pytest.approx(0.6931472, rel=1e-4) and whole[-1]["loss"] < 0.69
    for key in ("loss", "margin", "reward_chosen", "accuracy", "grad_norm"):
        first = key == "accuracy"  # before anything is learned margins are rounding, of either sign
        ours, theirs = ([line[key] for line in lines[first:]] for lines in (split, whole))
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-3), key
    if kind == "start":  # each rank measured its share of the pairs before the first step, and has those of all
        one, two = (load_file(tmp_path / name / "reference-stage0.safetensors") for name in ("one", "two"))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_of_hugging_face_learns_from_pairs_and_resumes(
    kind: str, stand_ins: Path, tmp_path: Path
) -> None:
    path = tmp_path / "whole.yaml"
    write_shards(list(Store(load_manifest(stand_ins / "pairs")))[:4], tmp_path / "few")  # the same four in every step
    text = f"name: whole\nmodel: {{from: {stand_ins / 'qwen2_5_vl'}}}\n"
    sources = f"{{pairs: {{shards: {tmp_path / 'few'}}}}}"
    text += f"data: {{workers: 0, sources: {sources}}}\nstages: {KINDS[kind].removeprefix('stages=')}\n"
    text += "run: {global_batch: 4, log_every: 1, threads: 1, save: {every: 2, keep: 10}}\n"
    path.write_text(text)
    recipe = load_recipe(path, [f"run.dir={tmp_path / 'run'}"])
    run(recipe, ("train",))
    lines, expected = metrics(tmp_path / "run"), final(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(0.6931472, rel=1e-4)
    assert lines[-1]["loss"] < 0.68 and lines[-1]["accuracy"] > 0.7 and lines[-1]["margin"] > 0
    (tmp_path / "run/checkpoints/stage0-dpo-step00000004.ckpt").unlink()  # as if it had been killed after step 2
    run(recipe, ("train",))
    torch.testing.assert_close(final(tmp_path / "run"), expected, atol=0, rtol=0)
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in lines]
