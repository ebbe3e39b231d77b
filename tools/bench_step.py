"""A step of our trainer beside the plainest loop of PyTorch: same model, batches, optimizer, clipping and data worker.

    python tools/bench_step.py [--steps 120] [--out tools/results/bench_step.md] [--profile FILE]

The loop knows nothing: take a batch, forward, loss over its weight, backward, clip, AdamW of the same flags, zero. Ours
is ``vlm train`` with everything that a recipe has on by default: exact data state, token-weighted loss, check of every
gradient, counted FLOPs and forward times, metrics every tenth step, samples traced. Both have a stream of the same
samples in the same order with a worker of its own, and the time to take a batch counts. They take turns step by step in
one process, so that what else the machine does meets both; each step of ours is divided by the plain step next to it.
"""

import argparse
import cProfile
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from vlm.build import build_collate, build_encoder, build_model, build_tokenizer
from vlm.data.scenes.make import make
from vlm.data.stream import MicroBatch, SampleStream, StreamConfig
from vlm.models.base import BaseVlm
from vlm.recipe import Recipe, load_recipe
from vlm.training.loss import inputs_of
from vlm.training.train import train
from vlm.training.work import open_sources

RECIPE = """
name: bench
model:
  vision: {{use: conv_vit, image: 48, dim: 64, depth: 2, heads: 4}}
  connector: {{use: mlp, depth: 2}}
  language:
    config: {{model_type: llama, hidden_size: 128, intermediate_size: 352, num_hidden_layers: 4,
      num_attention_heads: 4, num_key_value_heads: 4, max_position_embeddings: 256}}
    tokenizer: {folder}/scenes/tokenizer
data: {{workers: 1, sources: {{scenes: {{shards: {folder}/scenes/train}}}}}}
stages:
  - one:
      mix: {{scenes: 1}}
      train: {{vision: {{lr: 1e-4}}, connector: {{lr: 1e-4}}, language: {{lr: 1e-4}}}}
      schedule: {{use: constant}}
      steps: {steps}
run: {{dir: {folder}/run, global_batch: {batch}, threads: 1, resume: never, trace_samples: true,
  save: {{every: 100000}}}}
"""
WARMUP = 10


def stream_of(recipe: Recipe, model: BaseVlm, tokenizer: Any) -> Iterator[MicroBatch]:
    """The batches of the stage as the trainer gets them, from a worker of their own."""
    sources, encoder, size = open_sources(recipe), build_encoder(recipe, model, tokenizer), recipe.run.global_batch
    config = StreamConfig(size, size, 1, 0, recipe.data.workers, recipe.seed, recipe.stages[0].steps or 0)
    stores = [sources.stores[name] for name in recipe.stages[0].mix]
    return iter(SampleStream(stores, [1.0], config, encoder, build_collate(encoder, tokenizer)))


class Plain(Callback):
    """After each step of the trainer one of the plain loop on a model of its own; seconds of both, step by step."""

    def __init__(self, model: BaseVlm, batches: Iterator[MicroBatch]) -> None:
        self.twin, self.batches = model.train(), batches
        self.optimizer = torch.optim.AdamW(self.twin.parameters(), lr=1e-4, weight_decay=0.0)
        self.plain: list[float] = []
        self.ours: list[float] = []
        self.ids: list[list[str]] = []
        self.profile: cProfile.Profile | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.device = pl_module.device
        self.twin.to(self.device)
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.profile is not None:
            self.profile.disable()
        self._settle()
        start = time.perf_counter()
        self.ours.append(start - self.since)
        own = self._step()
        self._settle()
        self.since = time.perf_counter()
        self.plain.append(self.since - start)
        assert own.ids == batch.ids, "the two are to see the same samples"
        if self.profile is not None and batch_idx >= WARMUP:
            self.profile.enable()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.profile is not None:
            self.profile.disable()

    def _step(self) -> MicroBatch:
        micro = next(self.batches)
        batch = micro.batch.to(self.device)
        out = self.twin(inputs_of(batch), batch.weights)
        (out.loss / out.weight).backward()
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return micro

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(recipe: Recipe, profile: Path | None) -> tuple[list[float], list[float]]:
    """Seconds of the steps of the plain loop and of ours, without the first ones and the last, which saves."""
    tokenizer = build_tokenizer(recipe)
    torch.manual_seed(0)
    twin = build_model(recipe, tokenizer)
    beside = Plain(twin, stream_of(recipe, twin, tokenizer))
    beside.profile = cProfile.Profile() if profile else None
    train(recipe, build_model(recipe, tokenizer), tokenizer, lambda stage, steps: [beside])
    if beside.profile is not None:
        beside.profile.dump_stats(profile)  # type: ignore[arg-type]
    return beside.plain[WARMUP:-1], beside.ours[WARMUP:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--profile", type=Path, help="write what cProfile saw of the trainer's steps here")
    parser.add_argument("--out", type=Path, default=Path("tools/results/bench_step.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "scenes", train=400, test=12, seed=0)
        path = Path(folder) / "recipe.yaml"
        path.write_text(RECIPE.format(folder=folder, steps=arguments.steps, batch=arguments.batch))
        turns = [measure(load_recipe(path), arguments.profile) for _ in range(arguments.turns)]
    medians = [[statistics.median(times) * 1000 for times in turn] for turn in turns]
    ratios = [[mine / theirs for theirs, mine in zip(*turn, strict=True)] for turn in turns]
    middle = [statistics.median(each) for each in ratios]
    extra = [statistics.median(mine - theirs for theirs, mine in zip(*turn, strict=True)) * 1000 for turn in turns]
    cells = [", ".join(f"{turn[which]:.1f}" for turn in medians) for which in (0, 1)]
    whole = statistics.median(ratio for each in ratios for ratio in each)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    arguments.out.write_text(
        "# A step of the trainer beside the plainest loop of PyTorch\n\n"
        f"{device}; torch {torch.__version__}; fp32, batch of {arguments.batch}, {arguments.steps} steps a turn. Step "
        "by step in turn, each with a data worker of its own; how it is measured: `tools/bench_step.py`.\n"
        f"{arguments.note}\n\n"
        "| | turn by turn |\n|---|---|\n"
        f"| plain loop, ms per step (median) | {cells[0]} |\n| `vlm train`, ms per step (median) | {cells[1]} |\n"
        f"| ours - plain of neighbouring steps, ms (median) | {', '.join(f'{ms:.1f}' for ms in extra)} |\n"
        f"| ours / plain of neighbouring steps (median) | {', '.join(f'{ratio:.3f}' for ratio in middle)} |\n\n"
        f"All steps together: median ratio {whole:.3f}.\n"
    )
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
