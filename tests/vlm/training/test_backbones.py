"""Every backbone of ours as the encoder of the Scenes recipe: both stages train it, with both precisions."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from vlm.training import checkpoints

CONTRACT = Path(__file__).parents[2] / "models/backbones/test_contract.py"
TINY = runpy.run_path(str(CONTRACT))["TINY"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_it_trains_in_the_scenes_recipe(name, train):
    variant, config = TINY[name]
    vision = json.dumps({"use": name, "variant": variant, "image": 64, "config": config})
    short = ["stages.0.steps=2", "stages.1.steps=2", "stages.0.schedule.warmup=0", "stages.1.schedule.warmup=0"]
    seen = {}
    for precision in ("fp32", "bf16"):
        words = [f"model.vision={vision}", *short, f"run.precision={precision}", "stages.1.train.vision={lr: 1e-3}"]
        folder = train(*words, to=f"{name}-{precision}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["stage"] for line in lines] == [0, 0, 1, 1]
        assert all(torch.tensor(line["loss"]).isfinite() for line in lines)
        first, last = (checkpoints.read(path)["state_dict"] for path in sorted((folder / "checkpoints").glob("*.ckpt")))
        moved = {key for key in first if key.startswith("model.vision.") and not torch.equal(first[key], last[key])}
        assert moved  # the second stage goes on training it
        seen[precision] = lines[0]["loss"]
    assert seen["fp32"] == pytest.approx(seen["bf16"], rel=0.05) and seen["fp32"] != seen["bf16"]
