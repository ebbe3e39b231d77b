"""A composed model that is exported with trained adapters, and loaded back."""

from pathlib import Path
from typing import Any

import pytest

from vlm.commands import main

ONE = "stages=[{name: sft, mix: {scenes: 1}, steps: 3, train: {connector: {lr: 1e-2}, language: {lr: 1e-2, lora: 2}}}]"


def test_a_composed_model_comes_back_with_its_logits(
    train: Any, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(ONE)
    assert main(["export", str(recipe), str(tmp_path / "out"), ONE, f"run.dir={folder}"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{tmp_path / 'out'}: loaded back: logits of ")
    assert float(line.split(" by ")[1].split()[0]) < 1e-4
