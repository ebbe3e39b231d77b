"""What a cluster's user watches: counted work, SIGTERM, switches that change no result, loggers that are not there."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm.build import build_encoder, build_model, build_tokenizer
from vlm.data.batch import collate
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.store import Store
from vlm.models.program.attach import attach
from vlm.recipe import load_recipe
from vlm.training import checkpoints
from vlm.training.callbacks import append_line
from vlm.training.errors import TrainingError
from vlm.training.flops import FlopMeter
from vlm.training.loss import inputs_of

FASTV = "prune={use: fastv, layer: 1, keep: 25%}"
CHAT = (
    "stages=[{name: one, mix: {scenes: 1}, drop_image: 25%, steps: 3, clip: null,"
    " train: {vision: {lr: 1e-2}, connector: {lr: 1e-2}, language: {lr: 1e-2}}}]"
)
TIMM = "model.vision={timm: vit_tiny_patch16_224, pretrained: false}"


def batch_of(recipe: Any, count: int = 2) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    encoder = build_encoder(recipe, model, tokenizer)
    store = Store(load_manifest(list(recipe.data.sources["scenes"].shards)))
    return model, collate([encoder(store.read(n), Draw(n, 0, 0)) for n in range(count)], 0)


def counted(model: Any, batch: Any) -> tuple[float, float, float]:
    meter = FlopMeter(model)
    out = model(inputs_of(batch), batch.weights)
    out.loss.backward()
    found = meter.take()
    meter.detach()
    return found


def test_counted_work_is_what_torch_counts(recipe: Path) -> None:
    """In matrices; what it counts of convolutions is left out here, and of attention the half that causality hides."""
    model, batch = batch_of(load_recipe(recipe), 1)
    model.train()
    found, real, padded = counted(model, batch)
    assert real == padded
    with FlopCounterMode(display=False) as torch_counts:
        model(inputs_of(batch), batch.weights).loss.backward()
    matrices = sum(flops for op, flops in torch_counts.get_flop_counts()["Global"].items() if "mm" in str(op))
    causal = 3 * 2.0 * model.decoder.config.hidden_size * real**2 * model.decoder.config.num_hidden_layers
    whole = 3 * 4.0 * 16 * 36**2  # one block of width 16 over 36 patches
    assert found - causal - whole == matrices


def test_pruned_tokens_and_padding_are_no_work(recipe: Path) -> None:
    loaded = load_recipe(recipe, [FASTV])
    model, batch = batch_of(loaded, 4)
    whole, real, padded = counted(model, batch)
    assert real == float(batch.length.sum() + 35 * len(batch.images))  # 36 visual tokens instead of a placeholder
    assert padded > real
    from vlm.build import program_of

    with attach(model, program_of(loaded.own, model.facts)):
        cut, entering, _ = counted(model, batch)
    assert entering == real
    layer = FlopMeter(model).layers[1]
    gone, lengths = 27, (batch.length + 35 * torch.bincount(batch.image_owner, minlength=4)).double()
    scores = 3 * 2.0 * 16 * (lengths**2 - (lengths - gone) ** 2).sum()
    assert whole - cut == pytest.approx(float(layer.total * gone * 4 + scores), rel=1e-6)
    assert "_decode" not in vars(build_model(loaded, build_tokenizer(loaded)))


def test_a_frozen_part_costs_its_forward_alone(recipe: Path) -> None:
    model, batch = batch_of(load_recipe(recipe))
    model.requires_grad_(False)
    forward = 0.0
    meter = FlopMeter(model)
    model(inputs_of(batch), batch.weights)
    forward = meter.take()[0]
    meter.detach()
    model.requires_grad_(True)
    assert counted(model, batch)[0] == pytest.approx(3 * forward, rel=1e-9)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder: Path) -> dict[str, Any]:
    point = checkpoints.newest(folder / "checkpoints")
    assert point is not None
    return checkpoints.read(point.path)


def test_a_log_on_a_full_disk_is_one_line() -> None:
    with pytest.raises(TrainingError, match="/dev/full could not be written: No space left on device"):
        append_line(Path("/dev/full"), {"stage": 0, "step": 1})


def test_the_log_has_speed_memory_and_evenness(ranks: Any, tmp_path: Path) -> None:
    group = ranks(2, CHAT, "run.micro_batch=2")
    assert group.join() == [0, 0], group.output()
    for line in lines(tmp_path / "run"):
        assert line["padded_tokens_per_s"] > line["llm_tokens_per_s"] > line["tokens_per_s"] > 0
        assert line["tflops"] > 0 and "mfu" not in line  # no peak is known of a CPU
        assert 0.05 < line["peak_memory_gib"] < 50 and line["grad_norm"] > 0
        assert 1 <= line["max_over_mean_flops"] < 2 and 1 <= line["max_over_mean_time"] <= 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_sigterm_to_one_rank_saves_and_ends_all_with_zero(parallel: str, ranks: Any, tmp_path: Path) -> None:
    how = ("run.micro_batch=2", "run.save.every=1000", f"run.parallel={parallel}")
    group = ranks(2, CHAT.replace("steps: 3", "steps: 400"), *how)
    log = tmp_path / "run/metrics.jsonl"
    begun = time.monotonic()
    while time.monotonic() - begun < 60 and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.kill(group.processes[1].pid, signal.SIGTERM)
    assert group.join() == [0, 0], group.output()
    point = checkpoints.newest(tmp_path / "run/checkpoints")
    assert point is not None and 2 < point.step < 400
    assert f"stopped by SIGTERM, saved {point.path}; the same command goes on from it" in group.output()
    assert lines(tmp_path / "run")[-1]["step"] == point.step - 1
    assert "Traceback" not in group.output()


@pytest.mark.parametrize("prune", ["", FASTV], ids=["plain", "fastv"])
@pytest.mark.parametrize("parallel", ["single", "fsdp2"])
def test_activations_computed_again_change_nothing(
    prune: str, parallel: str, train: Any, ranks: Any, tmp_path: Path
) -> None:
    how = [TIMM, CHAT, *([prune] if prune else [])] if parallel == "single" else [CHAT, *([prune] if prune else [])]
    expected = final(train(*how, to="one"))["state_dict"]
    switch = "run.checkpoint_activations=true"
    if parallel == "single":
        found = final(train(*how, switch))["state_dict"]
    else:
        group = ranks(2, *how, switch, "run.parallel=fsdp2", "run.micro_batch=2")
        assert group.join() == [0, 0], group.output()
        found = final(tmp_path / "run")["state_dict"]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_activations_of_a_frozen_decoder_are_computed_again_too(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_layers as layers

    calls: list[bool] = []
    original = layers.GradientCheckpointingLayer.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.gradient_checkpointing and self.training and not self.self_attn.training)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layers.GradientCheckpointingLayer, "__call__", noted)
    frozen = CHAT.replace("vision: {lr: 1e-2}, connector: {lr: 1e-2}, language: {lr: 1e-2}", "connector: {lr: 1e-2}")
    train(frozen, "run.checkpoint_activations=true")
    assert calls and all(calls)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(train: Any) -> None:
    expected = final(train(CHAT, to="one"))["state_dict"]
    found = final(train(CHAT, "run.compile=true"))["state_dict"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_compiled_blocks_refuse_a_program(train: Any) -> None:
    with pytest.raises(TrainingError, match=r"run\.compile: compiled blocks take no program in training; found fastv"):
        train(CHAT, FASTV, "run.compile=true")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_told_before_training(name: str, train: Any, monkeypatch: Any) -> None:
    from vlm.training import loggers

    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=rf"run\.log: {name} is not installed; pip install 'vlm-recipes\[{name}\]'"):
        train(CHAT, f"run.log=[{name}]")


def test_tensorboard_reads_the_curves_of_metrics_and_a_resumed_run_goes_on(train: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on = ("run.log=[tensorboard]", "run.save.every=2")
    folder = train(CHAT, *on)
    for late in sorted((folder / "checkpoints").glob("*.ckpt"))[1:]:
        late.unlink()  # as if it had been killed after step 2
    train(CHAT, *on)
    [stage] = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(stage)).Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "lr/language", "llm_tokens_per_s"} <= {*events.Tags()["scalars"]}
    for name, of in (("loss", lambda line: line["loss"]), ("lr/language", lambda line: line["lr"]["language"])):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(of(line), rel=1e-6)) for line in lines], name
