"""Checkpoints that cannot be read, must not be run, or cannot be written; and the one that survives."""

import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.training import checkpoints
from vlm.training.errors import TrainingError

GOOD = {"state_dict": {"w": torch.arange(40.0)}, "recipe": {"identity": {"a": 1}}, "loops": {}, "global_step": 4}


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def zipped(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    files = checkpoints.Files()
    files.save_checkpoint(GOOD, tmp_path / "new" / "a.ckpt")
    assert files.failure == ""
    found = files.load_checkpoint(tmp_path / "new" / "a.ckpt")
    assert torch.equal(found["state_dict"].pop("w"), GOOD["state_dict"]["w"])
    assert found == {**GOOD, "state_dict": {}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "stage0-tags-step00000004.ckpt"
    path.write_bytes(zipped({**GOOD, "x": Evil(trap)}))
    with pytest.raises(TrainingError, match="none of it was run"):
        checkpoints.read(path)
    for other in (pickle.dumps(Evil(trap)), zipped({"x": Evil(trap)}, _use_new_zipfile_serialization=False)):
        path.write_bytes(other)
        with pytest.raises(TrainingError, match="found no zip"):
            checkpoints.read(path)
    assert not trap.exists()


def test_the_trap_of_these_tests_snaps_for_pickle(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


def test_training_runs_no_code_of_a_checkpoint(train: Any, tmp_path: Path) -> None:
    folder = train("stages.0.steps=2", "run.save.every=1")
    path = max((folder / "checkpoints").glob("stage1*"))
    path.write_bytes(zipped({**torch.load(path, weights_only=True), "callbacks": {"x": Evil(tmp_path / "trap")}}))
    for resume in ("auto", path):
        with pytest.raises(TrainingError, match="none of it was run"):
            train("stages.0.steps=2", f"run.resume={resume}")
    assert not (tmp_path / "trap").exists()


@settings(max_examples=150, deadline=None)
@given(
    cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8)
)
def test_a_damaged_checkpoint_is_read_or_refused_in_one_line(
    cut: float, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(zipped(GOOD))
    for place, flip in flips:
        content[int(place * len(content))] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    path.write_bytes(content[: int(cut * len(content))] if cut < 1 else content)
    try:
        checkpoints.read(path)
    except TrainingError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}, torch.zeros(3)], ids=["list", "weights alone", "tensor"])
def test_another_file_of_torch_is_no_checkpoint(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(TrainingError, match="expected one of a run of this project"):
        checkpoints.read(tmp_path / "x.ckpt")


def test_a_truncated_checkpoint_stops_training_with_its_name(train: Any) -> None:
    folder = train("stages.0.steps=1", "stages.1.steps=2")
    path = max((folder / "checkpoints").iterdir())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TrainingError, match=f"checkpoint {path} cannot be read"):
        train("stages.0.steps=1", "stages.1.steps=2")


@pytest.mark.parametrize("name", ["nothing.ckpt", "stage0-tags-step00000001.ckpt"])
def test_resume_from_a_file_that_is_not_there(name: str, train: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"run\.resume: expected a checkpoint"):
        train(f"run.resume={tmp_path / name}")


def test_the_newest_is_the_farthest_not_the_latest(tmp_path: Path) -> None:
    for name in ("stage1-b-step00000004.ckpt", "stage0-a-step00000090.ckpt", "stage1-b-step00000010.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / "stage1-b-step00000012.partial").touch()
    (tmp_path / "other.ckpt").touch()
    found = checkpoints.newest(tmp_path)
    assert found == (tmp_path / "stage1-b-step00000010.ckpt", 1, 10)
    assert checkpoints.newest(tmp_path / "nowhere") is None


# From the second checkpoint on the disk takes no file of more than a few bytes.
FULL = """
import resource
from vlm.training.callbacks import Save
save = Save.save

def full(self, trainer, done):
    if self.stage == 1 and done == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save(self, trainer, done)

Save.save = full
"""


@pytest.mark.parametrize(("world", "background"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_survives(
    world: int, background: bool, train: Any, ranks: Any, tmp_path: Path
) -> None:
    """In the background too, though it is known there at the next save only."""
    spare = tmp_path / "spare"
    spare.mkdir()
    folder, micro = tmp_path / "run", "run.micro_batch=2"
    how = f"run.save.background={str(background).lower()}"
    group = ranks(world, micro, how, change=FULL + f"import tempfile; tempfile.tempdir = {str(spare)!r}")
    assert group.join() == [2] * world, group.output()
    failed, good = (folder / f"checkpoints/stage1-sft-step0000000{step}.ckpt" for step in (8, 4))
    message = f"error: checkpoint {failed} could not be written: File too large; the last good one is {good}\n"
    assert message in group.output()
    assert "Traceback" not in group.output()
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == [f"stage{stage}-step0000000{n}.ckpt" for stage, n in (("0-tags", 4), ("0-tags", 6), ("1-sft", 4))]
    assert not any(spare.iterdir())
    assert checkpoints.read(good)["global_step"] == 4
    train(micro)
    whole = train(to="whole")
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files = checkpoints.Files()
    files.save_checkpoint(GOOD, tmp_path / "file" / "a.ckpt")
    assert files.failure
    files.save_checkpoint(GOOD, tmp_path / "a.ckpt")
    assert files.failure == ""


def test_in_the_background_the_state_of_the_moment_is_written_and_a_run_goes_on(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing takes longer than several steps here; at no moment there are fewer whole checkpoints than are kept."""
    whole = train(to="whole")
    write, whole_ones = checkpoints._write, []

    def slowly(checkpoint: Any, path: Path) -> None:
        time.sleep(0.3)
        whole_ones.append(len([*path.parent.glob("stage1-*.ckpt")]))
        write(checkpoint, path)

    monkeypatch.setattr(checkpoints, "_write", slowly)
    on = ("run.save.background=true", "run.save.every=2", "run.save.keep=2")
    folder = train(*on)
    left = sorted((folder / "checkpoints").glob("stage1-*"))
    assert [path.name[-10:] for path in left] == ["00008.ckpt", "00010.ckpt"]
    assert whole_ones[-5:] == [0, 1, 2, 2, 2]
    last = "checkpoints/stage1-sft-step00000010.ckpt"
    expected = checkpoints.read(whole / last)
    found = checkpoints.read(folder / last)
    for mine, theirs in ((found, expected), *zip(found["optimizer_states"], expected["optimizer_states"], strict=True)):
        key = "state_dict" if "state_dict" in mine else "state"
        torch.testing.assert_close(mine[key], theirs[key], atol=0, rtol=0)
    at_eight = checkpoints.read(folder / last.replace("10.", "08."))["state_dict"]
    torch.testing.assert_close(
        at_eight, checkpoints.read(whole / last.replace("10.", "08."))["state_dict"], atol=0, rtol=0
    )
    (folder / last).unlink()
    train(*on)
    torch.testing.assert_close(checkpoints.read(folder / last)["state_dict"], expected["state_dict"], atol=0, rtol=0)


def test_a_copy_in_memory_is_apart_and_what_is_tied_stays_one() -> None:
    table = torch.arange(6.0)
    content = {"a": table, "b": table, "part": table[:3], "more": [{"c": (1, "x", table)}], "none": torch.zeros(0)}
    found = checkpoints.snapshot(content)
    table.zero_()
    assert found["a"] is found["b"] and found["a"] is found["more"][0]["c"][2]
    assert found["a"].tolist() == [0, 1, 2, 3, 4, 5] and found["part"].tolist() == [0, 1, 2]
    assert found["more"][0]["c"][:2] == (1, "x")
