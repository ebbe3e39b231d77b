"""Step time of our trainer beside the plainest loop of PyTorch: same model, batch, optimizer, precision and clipping.

    python tools/bench_step.py [--steps 60] [--out tools/results/bench_step.md]

The loop knows nothing: one batch in memory, forward, backward, clip, step. Ours is ``vlm train`` with everything on
(loading by a worker, log of every step, counted FLOPs, finite check). The two take turns; medians of steps after the
first ten of each turn.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from vlm.build import build_collate, build_encoder, build_model, build_tokenizer
from vlm.data.draw import Draw
from vlm.data.scenes.make import make
from vlm.models.base import BaseVlm
from vlm.recipe import Recipe, load_recipe
from vlm.training.loss import inputs_of
from vlm.training.train import open_sources, train

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
      steps: {steps}
run: {{dir: {folder}/run, global_batch: 32, log_every: 1, threads: 1, resume: never, save: {{every: 100000}}}}
"""
WARMUP = 10


def plain(recipe: Recipe) -> list[float]:
    """Seconds of each step of the plain loop."""
    tokenizer = build_tokenizer(recipe)
    model: BaseVlm = build_model(recipe, tokenizer).train()
    encoder = build_encoder(recipe, model, tokenizer)
    store = open_sources(recipe).stores["scenes"]
    batches = []
    for step in range(recipe.stages[0].steps or 0):
        numbers = [(step * 32 + n) % len(store) for n in range(32)]
        examples = [encoder(store.read(n), Draw(n, 0, 0)) for n in numbers]
        batches.append(build_collate(encoder, tokenizer)(examples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        out = model(inputs_of(batch), batch.weights)
        (out.loss / out.weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP:]


def ours(recipe: Recipe) -> list[float]:
    """Seconds from the end of each step to the end of the next."""
    tokenizer = build_tokenizer(recipe)
    train(recipe, build_model(recipe, tokenizer), tokenizer)
    lines = [json.loads(line) for line in (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()]
    clock = [line["seconds"] for line in lines]
    return [after - before for before, after in pairwise(clock)][WARMUP - 1 : -1]  # the last one saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=Path("tools/results/bench_step.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "scenes", train=400, test=12, seed=0)
        path = Path(folder) / "recipe.yaml"
        path.write_text(RECIPE.format(folder=folder, steps=arguments.steps))
        recipe, loop, trainer = load_recipe(path), [], []
        for _ in range(arguments.turns):
            loop.append(plain(recipe))
            trainer.append(ours(recipe))
    medians = [[statistics.median(turn) * 1000 for turn in turns] for turns in (loop, trainer)]
    ratios = [mine / theirs for theirs, mine in zip(*medians, strict=True)]
    cells = [", ".join(f"{value:.1f}" for value in row) for row in medians]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    arguments.out.write_text(
        "# A step of the trainer beside the plainest loop of PyTorch\n\n"
        f"{device}; torch {torch.__version__}; batch of 32, {arguments.steps} steps a turn, medians per turn in ms.\n"
        f"{arguments.note}\n\n"
        "| | ms per step, turn by turn |\n|---|---|\n"
        f"| plain loop, batches in memory | {cells[0]} |\n| `vlm train`, everything on | {cells[1]} |\n"
        f"| ratio | {', '.join(f'{ratio:.3f}' for ratio in ratios)}; median {statistics.median(ratios):.3f} |\n"
    )
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
