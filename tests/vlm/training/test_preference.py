"""Pairs that a trained model made, and stages that learn from them: they resume exactly and split as any batch does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.commands import main
from vlm.data.check import check
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.models.lora import is_adapter
from vlm.plan import plan
from vlm.recipe import RecipeError, load_recipe
from vlm.run import run
from vlm.training.errors import TrainingError

SHORT = "stages=[{name: sft, mix: {scenes: 1}, steps: 40, train: {connector: {lr: 1e-2}, language: {lr: 1e-2}}}]"
STAGE = "{name: dpo, mix: {pairs: 1}, steps: 6, train: {language: {lr: 1e-2, %s}}, objective: {use: dpo, %s}}"
ADAPTER, START = STAGE % ("lora: 2", "reference: adapter"), STAGE % ("weight_decay: 0", "reference: start")
M3ID = ["--chosen", "{mitigate: {use: m3id, decay: 1, tau: 1}}", "--prompt", "Please describe this image briefly."]
# Sampled, because so short a run says one thing only.
M3ID += ["evaluate.decode={use: sample}", "--max-new-tokens", "8"]
LAST = "checkpoints/stage0-dpo-step00000006.ckpt"


@pytest.fixture(scope="session")
def base(written: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A recipe file, the folder of a short run of it, and pairs that its model made."""
    folder = tmp_path_factory.mktemp("base")
    recipe = written(folder)
    run(load_recipe(recipe, [SHORT]), ("train",))
    given = [str(recipe), SHORT, "--out", str(folder / "pairs"), "--samples", "60", *M3ID]
    assert main(["data", "make-pairs", *given]) == 0
    return recipe, folder / "run", folder / "pairs"


def weights(folder: Path) -> dict[str, Any]:
    return torch.load(folder / LAST, weights_only=True)["state_dict"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def dpo(base: tuple[Path, Path, Path], tmp_path: Path) -> Any:
    """``dpo(stage, *overrides, to=...)`` trains a stage on the pairs, from the short run, and returns its folder."""
    recipe, start, pairs = base

    def call(stage: str, *overrides: str, to: str = "dpo") -> Path:
        words = [f"stages=[{stage}]", f"model.weights={start}", f"data.sources={{pairs: {{shards: {pairs}}}}}"]
        run(load_recipe(recipe, [*words, *overrides, f"run.dir={tmp_path / to}"]), ("train",))
        return tmp_path / to

    return call


def test_pairs_are_made_whole_seeded_and_can_be_checked(
    base: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, start, pairs = base
    assert check(pairs) == []
    store = Store(load_manifest(pairs))
    assert len(store) > 10
    for sample in store:
        asked, answered = sample.messages
        assert asked.role == "user" and answered.role == "assistant" and len(sample.rejected) == 1
        assert answered.content != sample.rejected[0].content
        assert sample.meta["pair"]["rejected"] == "no-image"
    given = ["data", "make-pairs", str(recipe), SHORT, f"run.dir={start}", "--samples", "20", *M3ID]
    for name in ("one", "two"):
        assert main([*given, "--out", str(tmp_path / name), "--seed", "3"]) == 0
    assert [f.read_bytes() for f in sorted((tmp_path / "one").glob("*.tar"))] == [
        f.read_bytes() for f in sorted((tmp_path / "two").glob("*.tar"))
    ]
    out = capsys.readouterr().out
    assert "with equal answers" in out
    assert main([*given, "--out", str(tmp_path / "none"), "--chosen", "{}", "--rejected", "{}"]) == 2
    assert "expected samples to write, found none" in capsys.readouterr().err
    assert not list((tmp_path / "none").glob("*.tar"))
    assert main([*given, "--out", str(tmp_path / "x"), "--chosen", "{mitigate: {use: m3dd}}"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [ADAPTER, START], ids=["adapter", "start"])
def test_a_stage_of_pairs_begins_at_log_2_learns_and_resumes_to_the_same_bits(stage: str, dpo: Any) -> None:
    folder = dpo(stage)
    lines = metrics(folder)
    assert lines[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] < 0.68 and lines[-1]["accuracy"] > 0.6 and lines[-1]["margin"] > 0
    expected = weights(folder)
    (folder / LAST).unlink()  # as if it had been killed after step 4
    dpo(stage)
    torch.testing.assert_close(weights(folder), expected, atol=0, rtol=0)
    assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in lines]


@pytest.mark.parametrize("stage", [ADAPTER, START], ids=["adapter", "start"])
def test_micro_batches_change_nothing(stage: str, dpo: Any) -> None:
    whole, split = weights(dpo(stage)), weights(dpo(stage, "run.micro_batch=2", to="split"))
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)


def test_only_adapters_train_and_the_rest_is_what_the_other_run_learned(dpo: Any, base: Any) -> None:
    newest = max((base[1] / "checkpoints").glob("*.ckpt"))
    before = torch.load(newest, weights_only=True)["state_dict"]
    after = weights(dpo(ADAPTER))
    for name, value in after.items():
        if not is_adapter(name):
            assert torch.equal(value, before[name.replace(".base_layer.", ".")]), name
    assert any(bool(value.any()) for name, value in after.items() if ".lora_B." in name)


def test_the_start_is_measured_once_and_a_resumed_run_needs_it(dpo: Any, tmp_path: Path) -> None:
    folder = dpo(START)
    (folder / LAST).unlink()
    file = folder / "reference-stage0.safetensors"
    shutil.copy(file, tmp_path / "kept")
    file.unlink()
    with pytest.raises(TrainingError, match="expected the log-probabilities of this stage's start"):
        dpo(START)
    file.write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="expected the log-probabilities"):
        dpo(START)
    shutil.copy(tmp_path / "kept", file)
    dpo(START)


@pytest.mark.parametrize("options", ["segment_weight: 3", "image_weight: 1, anchor_weight: 1", "reference: none"])
def test_every_term_trains(options: str, dpo: Any) -> None:
    stage = STAGE % ("weight_decay: 0", options)
    assert metrics(dpo(stage.replace("steps: 6", "steps: 2")))[-1]["loss"] > 0


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (STAGE % ("weight_decay: 0", "reference: adapter"), "no part trains with lora"),
        (ADAPTER.replace("train: {", "train: {connector: {lr: 1e-3}, "), "connector trains its weights"),
        (f"{ADAPTER.replace('name: dpo', 'name: a')}, {ADAPTER}", "stage a has trained the adapters of language"),
        (START.replace("steps: 6", "steps: 6, drop_image: 10%"), "expected drop_image 0"),
        (STAGE % ("lora: 2", "beta: 0"), "beta: expected a number above 0"),
        (START.replace("pairs: 1", "scenes: 1"), "rejected: expected an answer to avoid, found none"),
        (STAGE.replace("dpo, %s", "povid, %s") % ("lora: 2", "reference: start"), "take reference: adapter"),
    ],
)
def test_what_contradicts_itself_is_one_line_of_the_plan(stage: str, message: str, base: Any, scenes: Path) -> None:
    recipe, _, pairs = base
    sources = f"data.sources={{pairs: {{shards: {pairs}}}, scenes: {{shards: {scenes}/train}}}}"
    with pytest.raises(ValueError, match=message) as raised:
        plan(load_recipe(recipe, [f"stages=[{stage}]", sources]))
    assert "\n" not in str(raised.value)


def test_weights_of_another_model_or_of_none_are_refused(dpo: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not fit the model"):
        dpo(START, "model.language.config.hidden_size=32")
    with pytest.raises(TrainingError, match=r"expected a checkpoint of this run, found none; .* model.weights=null"):
        dpo(START, f"model.weights={tmp_path / 'nothing'}")


def test_a_checkpoint_from_hugging_face_brings_its_own_weights(base: Any) -> None:
    with pytest.raises(RecipeError, match=r"stands beside model\.from"):
        load_recipe(base[0], ["model={from: {use: hf, name: x}, weights: y}"])
