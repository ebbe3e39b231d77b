"""Prefill time under each pruner against the unpruned model, at LLaVA-1.5 token counts: 576 visual + 64 text, batch 1.

    python tools/bench_prefill.py [--width 256 --layers 8 --repeats 7 --device auto --threads 2]

The language model is a Llama with random weights; visual features are random and enter at the connector, so neither
a vision encoder nor a download is needed. A timed prefill is everything between the images' features and the logits
of the first token: connector, scoring and selection, the cut, the decoder, its cache. All settings take turns in
every repeat, so that what else the machine does falls on all of them; a ratio is the median over the repeats of
unpruned by pruned time within a repeat. FLOPs are those of the decoder alone, without scoring: in a layer of n tokens
4nD^2 + 2n^2D + 3nDm (D width, m width inside the MLP; the count of the pruning literature).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from vlm.models.connectors.mlp import Mlp
from vlm.models.encoder import Features, ImageSpec
from vlm.models.language import build_language
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import Program
from vlm.models.pruners.divprune import Divprune
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random
from vlm.models.pruners.stride import Stride
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel

VISUAL_GRID, TEXT, VOCABULARY = (24, 24), 64, 1000
METHODS: dict[str, Callable[..., Any]] = {"random": Random, "stride": Stride, "divprune": Divprune, "fastv": Fastv}
RESULTS = Path(__file__).parent / "results" / "bench_prefill.md"


class Row(NamedTuple):
    """One setting: its visual tokens in each layer, seconds of each repeat, FLOPs of the decoder."""

    method: str
    keep: str
    visual_tokens: list[float]
    seconds: list[float]
    flops: float


class GivenFeatures(nn.Module):
    """An encoder that returns the same random features for any image."""

    dim, grid, image = 64, VISUAL_GRID, ImageSpec(24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self) -> None:
        super().__init__()
        self.features: Tensor
        self.register_buffer("features", torch.randn(1, VISUAL_GRID[0] * VISUAL_GRID[1], self.dim))

    def forward(self, images: Tensor) -> Features:
        return Features(self.features, self.grid)


def build(width: int, layers: int, device: torch.device) -> VisionLanguageModel:
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": int(width * 2.6875),  # LLaMA-7B: 11008 / 4096
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
    }
    vision = GivenFeatures()
    model = VisionLanguageModel(vision, Mlp(vision.dim, width), build_language(config, VOCABULARY))
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def prompt(device: torch.device) -> Inputs:
    """One row: half of the text, the image, the other half."""
    tokens = torch.randint(0, VOCABULARY, (1, TEXT + 1), device=device)
    tokens[0, TEXT // 2] = IMAGE_TOKEN
    owner = torch.zeros(1, dtype=torch.long, device=device)
    image = torch.randn(1, 3, 24, 24, device=device)  # its features are given, so its type does not matter
    return Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool), image, owner)


def decoder_flops(model: VisionLanguageModel, visual_tokens: list[float]) -> float:
    """Multiply-accumulates of the decoder's layers for a prompt with so many visual tokens in each."""
    config: Any = model.language.config
    width, inner = config.hidden_size, config.intermediate_size
    lengths = [visual + TEXT for visual in visual_tokens]
    return sum(4 * n * width**2 + 2 * n**2 * width + 3 * n * width * inner for n in lengths)


def timed(model: VisionLanguageModel, inputs: Inputs, program: Program) -> tuple[float, list[float]]:
    """Seconds of one prefill under ``program``, and the visual tokens of each layer."""
    synchronize = torch.cuda.synchronize if inputs.tokens.is_cuda else lambda: None
    with torch.inference_mode(), attach(model, program):
        synchronize()
        start = time.perf_counter()
        _, stream = model.prefill(inputs)
        synchronize()
        seconds = time.perf_counter() - start
    return seconds, stream.run.visual_tokens(model.facts.layers)


def measure(model: VisionLanguageModel, inputs: Inputs, budgets: list[str], repeats: int) -> list[Row]:
    programs: dict[tuple[str, str], Program] = {("none", "100%"): ()}
    for keep in budgets:
        for name, method in METHODS.items():
            programs[name, keep] = method(keep=Budget.parse(keep)).program(model.facts)
    rows = {}
    for setting, program in programs.items():  # the first pass warms up and tells the counts
        tokens = timed(model, inputs, program)[1]
        rows[setting] = Row(*setting, tokens, [], decoder_flops(model, tokens))
    for _ in range(repeats):
        for setting, program in programs.items():
            rows[setting].seconds.append(timed(model, inputs, program)[0])
    return list(rows.values())


def table(rows: list[Row]) -> list[str]:
    plain = rows[0]
    lines = [
        "| pruner | keep | visual tokens, layer average | prefill ms, median | ms, min .. max | time unpruned / pruned "
        "| FLOPs unpruned / pruned |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, average = statistics.median(row.seconds), sum(row.visual_tokens) / len(row.visual_tokens)
        spread = f"{1e3 * min(row.seconds):.1f} .. {1e3 * max(row.seconds):.1f}"
        faster = statistics.median(a / b for a, b in zip(plain.seconds, row.seconds, strict=True))
        ratios = f"{faster:.2f} | {plain.flops / row.flops:.2f}"
        lines.append(f"| {row.method} | {row.keep} | {average:.0f} | {1e3 * median:.1f} | {spread} | {ratios} |")
    return lines


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table, as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    torch.manual_seed(0)
    model = build(arguments.width, arguments.layers, device)
    rows = measure(model, prompt(device), ["50%", "25%"], arguments.repeats)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    head = [
        "# Prefill under pruners",
        "",
        f"`python tools/bench_prefill.py --width {arguments.width} --layers {arguments.layers} --repeats "
        f"{arguments.repeats} --device {device.type} --threads {arguments.threads}`",
        "",
        f"* {datetime.now(UTC):%Y-%m-%d}; {machine(device)}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {str(next(model.parameters()).dtype).removeprefix('torch.')}",
        f"* {millions:.1f} M parameters; 576 visual + {TEXT} text tokens, batch 1; {arguments.repeats} interleaved "
        "repeats, ratios within a repeat. The time includes scoring and selection; FLOPs are the decoder's alone.",
        "",
    ]
    text = "\n".join([*head, *table(rows)]) + "\n"
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
