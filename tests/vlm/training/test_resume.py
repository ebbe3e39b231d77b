"""A run killed with SIGKILL and resumed consumes, logs and learns what an uninterrupted one does, in any layout."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.data.store import Store
from vlm.training.errors import TrainingError

DROPOUT = "model.language.config.attention_dropout=0.5"
LAST = "checkpoints/stage1-sft-step00000010.ckpt"

# The process stops for good once it has done (and saved, where that is due) the step it is told.
STOP = """
import time
from pathlib import Path
from vlm.training.callbacks import Save

end = Save.on_train_batch_end

def stop(self, trainer, module, outputs, batch, index):
    end(self, trainer, module, outputs, batch, index)
    if (self.stage, batch.step) == AT and batch.last_in_window:
        Path(f"{SIGN}{trainer.global_rank}").touch()
        time.sleep(600)

Save.on_train_batch_end = stop
"""

Killed = Callable[..., Path]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def learned(folder: Path) -> list[tuple[Any, ...]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [
        tuple(line[key] for key in ("stage", "step", "steps", "loss", "lr")) for line in lines(folder, "metrics.jsonl")
    ]


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / LAST, weights_only=True)


def wait_for(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def killed(ranks: Any, tmp_path: Path) -> Killed:
    """The folder of a run of ``world`` processes killed after a step of a stage."""

    def call(world: int, stage: int, step: int, *overrides: str, to: str = "killed") -> Path:
        sign = tmp_path / "stopped"
        change = STOP.replace("AT", repr((stage, step))).replace("{SIGN}", str(sign))
        group = ranks(world, *overrides, to=to, change=change)
        wait_for(lambda: all(Path(f"{sign}{rank}").exists() for rank in range(world)))
        group.kill()
        assert group.join() == [-signal.SIGKILL] * world
        return tmp_path / to

    return call


def test_a_killed_run_goes_on_to_the_same_bits_and_repeats_nothing(
    train: Any, killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(DROPOUT, to="whole")
    folder = killed(1, 1, 6, DROPOUT)
    assert [line["step"] for line in lines(folder, "samples.jsonl") if line["stage"] == 1] == list(range(7))
    read: list[str] = []
    store_read = Store.read

    def counted(self: Store, number: int) -> Any:
        read.append(self.key(number))
        return store_read(self, number)

    monkeypatch.setattr(Store, "read", counted)
    train(DROPOUT, to="killed")  # 4 steps of the second stage are saved, 7 were done
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert read == [
        key for line in lines(whole, "samples.jsonl") if (line["stage"], line["step"]) >= (1, 4) for key in line["ids"]
    ]
    assert learned(folder) == learned(whole)
    found, expected = final(folder), final(whole)
    assert found["global_step"] == expected["global_step"] == 10
    assert found["lr_schedulers"] == expected["lr_schedulers"]
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], atol=0, rtol=0)
    (ours,), (theirs,) = found["optimizer_states"], expected["optimizer_states"]
    torch.testing.assert_close(ours["state"], theirs["state"], atol=0, rtol=0)
    assert ours["param_groups"] == theirs["param_groups"]
    assert {float(state["step"]) for state in ours["state"].values()} == {10.0}


@pytest.mark.parametrize("at", [(0, 4), (0, 5), (1, 1), (1, 3), (1, 6)])
def test_killed_anywhere_and_resumed_in_another_layout(
    at: tuple[int, int], train: Any, killed: Killed, ranks: Any, tmp_path: Path
) -> None:
    whole = train(to="whole")
    folder = killed(1, *at)
    copies = [Path(shutil.copytree(folder, tmp_path / name)) for name in ("workers", "accumulated", "ranks")]
    train("data.workers=2", to="workers")
    train("run.micro_batch=1", to="accumulated")
    group = ranks(2, "run.micro_batch=2", to="ranks")
    assert group.join() == [0, 0], group.output()
    for copy in copies:
        assert (copy / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text(), copy.name
        found, expected = final(copy), final(whole)
        assert found["global_step"] == 10
        torch.testing.assert_close(found["state_dict"], expected["state_dict"], atol=1e-5, rtol=1e-5)
        for (*ours, loss, lr), (*theirs, expected_loss, expected_lr) in zip(learned(copy), learned(whole), strict=True):
            assert (ours, lr) == (theirs, expected_lr)
            assert loss == pytest.approx(expected_loss, rel=1e-4)


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 8, 2), (1, 4, 0), (2, 4, 1)])
def test_two_processes_killed_and_resumed_as_others(
    world: int, micro: int, workers: int, train: Any, killed: Killed, ranks: Any
) -> None:
    whole = train(to="whole")
    folder = killed(2, 1, 6, "run.micro_batch=1", "data.workers=1")  # which has read ahead
    group = ranks(world, f"run.micro_batch={micro}", f"data.workers={workers}", to="killed")
    assert group.join() == [0] * world, group.output()
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    torch.testing.assert_close(final(folder)["state_dict"], final(whole)["state_dict"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_command_on_two_devices_killed_at_any_moment_and_resumed_by_one_process(
    train: Any, program: Any, tmp_path: Path
) -> None:
    length = ("stages.1.steps=60", "run.save.every=7")
    started = program(*length, "run.devices=2", "run.parallel=ddp", to="killed")
    trace = tmp_path / "killed/samples.jsonl"
    wait_for(lambda: started.poll() is not None or (trace.exists() and trace.read_text().count("\n") > 26), 120)
    os.killpg(started.pid, signal.SIGKILL)  # the command and the process that Lightning started from it
    assert started.wait() == -signal.SIGKILL, started.communicate()
    done = trace.read_text().count("\n")
    assert 26 < done < 60
    train(*length, "data.workers=2", to="killed")
    whole = train(*length, to="whole")
    assert trace.read_text() == (whole / "samples.jsonl").read_text()


def test_a_finished_run_is_left_as_it_is(train: Any) -> None:
    folder = train()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resume_never_begins_anew(train: Any) -> None:
    folder = train("stages.1.steps=4")
    train("run.resume=never")
    assert [(line["stage"], line["step"]) for line in lines(folder, "samples.jsonl")] == [
        *((0, step) for step in range(6)),
        *((1, step) for step in range(10)),
    ]


def test_resume_from_a_chosen_checkpoint_forgets_what_came_after_it(train: Any, killed: Killed) -> None:
    folder = train()
    weights, trace = final(folder)["state_dict"], (folder / "samples.jsonl").read_text()
    chosen = folder / "checkpoints/stage0-tags-step00000004.ckpt"
    killed(1, 1, 4, f"run.resume={chosen}", "run.save.keep=1", to="run")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "stage0-tags-step00000006.ckpt",
        "stage1-sft-step00000004.ckpt",
    ]
    train()
    assert (folder / "samples.jsonl").read_text() == trace
    torch.testing.assert_close(final(folder)["state_dict"], weights, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=4", r"expected seed = 4, found 3"),
        ("stages.1.train.connector.lr=3e-3", r"expected stages\.1\.train\.connector\.lr = 0\.003, found 0\.01"),
        ("model.vision.dim=32", r"expected model\.vision\.dim = 32, found 16"),
        ("run.global_batch=4", r"expected run\.global_batch = 4, found 8"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(override: str, expected: str, train: Any) -> None:
    folder = train("stages.0.steps=1", "stages.1.steps=1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"}
    with pytest.raises(TrainingError, match=expected) as raised:
        train("stages.0.steps=1", "stages.1.steps=1", override)
    assert "\n" not in str(raised.value)
    assert "run.resume=never" in str(raised.value)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "override",
    ["data.workers=1", "run.micro_batch=2", "run.log_every=3", "run.save.every=2", "evaluate.batch=7", "name=other"],
)
def test_what_changes_no_result_may_change_on_resume(override: str, train: Any) -> None:
    folder = train("run.save.every=5")
    (folder / LAST).unlink()
    train(override)
    assert lines(folder, "samples.jsonl")[-1]["step"] == 9
    assert final(folder)["global_step"] == 10
