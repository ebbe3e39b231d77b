"""What a run logs, how long its stages are, and what it does with samples that cannot be read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm.build import build_encoder, build_model, build_tokenizer
from vlm.commands import main
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.index import load_manifest
from vlm.data.order import Order
from vlm.data.store import Store
from vlm.data.write import write_shards
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.chat import ChatLoss
from vlm.recipe import load_recipe
from vlm.training import callbacks
from vlm.training.loss import Loss
from vlm.training.work import stage_steps

CHAT = (
    "stages=[{name: one, mix: {scenes: 1}, steps: 4, schedule: {warmup: 2, use: linear},"
    " train: {connector: {lr: 1e-2}, language: {lr: 2e-2}}}]"
)

Spoil = Callable[..., Path]


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def ids_of(scenes: Path, steps: range, seed: int = 3) -> list[str]:
    """The keys of the global batches of some steps; the second stage's seed is one more than the first's."""
    store = Store(load_manifest(scenes / "train"))
    order = Order([len(store)], [1.0], seed)
    return [store.key(order.at(position).number) for position in range(8 * steps.start, 8 * steps.stop)]


@pytest.fixture
def spoil(scenes: Path, tmp_path: Path) -> Spoil:
    """``spoil(keys)`` gives a copy of the training shards where the images of these samples are cut off."""

    def call(keys: list[str]) -> Path:
        samples = Store(load_manifest(scenes / "train"))
        spoiled = (
            replace(sample, media=(sample.media[0][:64],)) if sample.key in keys else sample for sample in samples
        )
        folder = tmp_path / "spoiled"
        write_shards(spoiled, folder)
        return folder

    return call


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float, float]]:
    """Keys, summed loss and weight of every micro-batch of this process, as the model gave them."""
    found: list[tuple[list[str], float, float]] = []
    forward = ChatLoss.forward

    def noted(self: ChatLoss, model: VisionLanguageModel, batch: Any) -> Loss:
        loss = forward(self, model, batch)
        found.append((batch.keys, float(loss.value.detach()), float(loss.weight)))
        return loss

    monkeypatch.setattr(ChatLoss, "forward", noted)
    return found


def test_what_is_logged(train: Any, seen: list[tuple[list[str], float, float]]) -> None:
    folder = train(CHAT, "run.micro_batch=2", "run.log_every=2")
    first, last = lines(folder)
    assert [first[key] for key in ("stage", "name", "step", "steps")] == [0, "one", 1, 4]
    assert [last[key] for key in ("stage", "name", "step", "steps")] == [0, "one", 3, 4]
    for line, micro_batches in ((first, seen[:8]), (last, seen[8:])):  # two steps of four micro-batches each
        losses, weights = (sum(column) for column in list(zip(*micro_batches, strict=True))[1:])
        assert line["loss"] == pytest.approx(losses / weights, rel=1e-6)
        assert min(line[key] for key in ("samples_per_s", "tokens_per_s", "data_wait_s")) > 0
        assert line["tokens_per_s"] > 5 * line["samples_per_s"]
        assert "skipped" not in line
    assert len({weight for _, _, weight in seen}) > 2  # a mean of means would be another number
    assert (first["lr"], last["lr"]) == ({"connector": 0.01, "language": 0.02}, {"connector": 0.005, "language": 0.01})
    assert first["seconds"] < last["seconds"]


def test_each_stage_reads_the_data_in_an_order_of_its_own(train: Any, scenes: Path) -> None:
    trace = lines(train(), "samples.jsonl")
    for stage, steps in ((0, 6), (1, 10)):
        ids = [line["ids"] for line in trace if line["stage"] == stage]
        assert [len(batch) for batch in ids] == [8] * steps
        assert [key for batch in ids for key in batch] == ids_of(scenes, range(steps), seed=3 + stage)


def test_what_two_processes_log_is_of_both(train: Any, ranks: Any, tmp_path: Path) -> None:
    options = ("run.log_every=3", "run.micro_batch=2")
    alone = lines(train(*options, to="alone"))
    group = ranks(2, *options)
    assert group.join() == [0, 0], group.output()
    together = lines(tmp_path / "run")
    for ours, theirs in zip(together, alone, strict=True):
        for key in ("stage", "step", "lr"):
            assert ours[key] == theirs[key]
        for key in {"loss", "tag_accuracy"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
        # in the same time both would have read the same, and tokens go with samples
        assert ours["tokens_per_s"] / ours["samples_per_s"] == pytest.approx(
            theirs["tokens_per_s"] / theirs["samples_per_s"]
        )


def test_lines_of_steps_that_are_done_again_go_and_so_does_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    callbacks.keep_lines_before(path, 0, 0)
    assert not path.exists()
    written = [json.dumps({"stage": stage, "step": step}) + "\n" for stage in (0, 1) for step in range(3)]
    path.write_text("".join(written) + '{"stage": 2, "st')
    callbacks.keep_lines_before(path, 1, 1)
    assert path.read_text() == "".join(written[:4])
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (16, 2), (17, 3)])
def test_a_stage_may_be_so_many_samples_long(samples: int, steps: int, train: Any) -> None:
    folder = train(CHAT.replace("steps: 4", f"samples: {samples}"))
    assert [line["step"] for line in lines(folder, "samples.jsonl")] == list(range(steps))


def test_a_stage_may_be_so_many_tokens_long(recipe: Path, scenes: Path, spoil: Spoil) -> None:
    store = Store(load_manifest(scenes / "train"))
    bad = [store.key(0), store.key(7)]
    loaded = load_recipe(recipe, [CHAT.replace("steps: 4", "tokens: 5k"), f"data.sources.scenes.shards={spoil(bad)}"])
    tokenizer = build_tokenizer(loaded)
    encoder = build_encoder(loaded, build_model(loaded, tokenizer), tokenizer)
    lengths = [len(encoder(store.read(n), Draw(n, 0, 0)).tokens) for n in range(200) if n not in (0, 7)]
    expected = round(5000 / 8 / (sum(lengths) / 198))
    spoiled = Store(load_manifest(loaded.data.sources["scenes"].shards))
    assert stage_steps(loaded.stages[0], 8, [spoiled], encoder) == expected > 10


def test_a_tokens_stage_over_data_that_cannot_be_read_says_so(train: Any, scenes: Path, spoil: Spoil) -> None:
    shards = spoil(ids_of(scenes, range(25)))
    with pytest.raises(DataError, match="expected readable samples, found none"):
        train(CHAT.replace("steps: 4", "tokens: 5k"), f"data.sources.scenes.shards={shards}")


@pytest.mark.parametrize("micro", [1, 8])
def test_a_bad_sample_is_skipped_and_counted_and_changes_nothing_for_the_others(
    micro: int, train: Any, scenes: Path, spoil: Spoil, seen: list[tuple[list[str], float, float]]
) -> None:
    whole = train(CHAT, "run.micro_batch=1", to="whole")
    bad = ids_of(scenes, range(1, 2))[5]
    alone = {keys[0]: (loss, weight) for keys, loss, weight in seen[8:16]}  # the second step, one sample at a time
    folder = train(CHAT, f"run.micro_batch={micro}", f"data.sources.scenes.shards={spoil([bad])}")
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert [line.get("skipped") for line in lines(folder)] == [None, 1, None, None]
    good = [pair for key, pair in alone.items() if key != bad]
    assert len(good) == 7
    expected = sum(loss for loss, _ in good) / sum(weight for _, weight in good)
    assert lines(folder)[1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert lines(folder)[2]["loss"] != lines(whole)[2]["loss"]


def test_a_bad_sample_in_a_stage_of_tags(train: Any, scenes: Path, spoil: Spoil) -> None:
    bad = ids_of(scenes, range(1))[3]
    shards = spoil([bad])
    for micro in (1, 8):
        folder = train(f"run.micro_batch={micro}", f"data.sources.scenes.shards={shards}", to=f"run{micro}")
        assert [line.get("skipped") for line in lines(folder)][:2] == [1, None]


def test_too_many_bad_samples_stop_the_run_with_their_keys(
    recipe: Path, scenes: Path, spoil: Spoil, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = ids_of(scenes, range(2, 6))
    options = [f"data.sources.scenes.shards={spoil(bad)}", "run.save.every=1", "data.on_bad_sample.consecutive=5"]
    assert main(["train", str(recipe), *options]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: bad samples: expected at most 5 in a row, found ")
    assert all(key in error for key in bad[:6])
    assert bad[6] not in error
    folder = tmp_path / "run"
    assert [line["step"] for line in lines(folder, "samples.jsonl")] == [0, 1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "stage0-tags-step00000001.ckpt",
        "stage0-tags-step00000002.ckpt",
    ]


def test_bad_samples_of_one_rank_end_them_all(ranks: Any, scenes: Path, spoil: Spoil) -> None:
    bad = [key for step in range(1, 6) for key in ids_of(scenes, range(step, step + 1))[4:]]  # the second rank's
    options = (f"data.sources.scenes.shards={spoil(bad)}", "data.on_bad_sample.consecutive=5")
    group = ranks(2, *options)
    codes = group.join()
    assert codes[1] == 2
    assert codes[0] not in (0, None)
    assert "error: bad samples: expected at most 5 in a row, found " in group.output()
