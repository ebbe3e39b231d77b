"""Prefill time under every pruner against the unpruned model, at LLaVA-1.5's counts: 576 visual + 64 text, batch 1.

    python tools/bench_prefill.py [--shape narrow --repeats 7 --device auto --threads 2]
    python tools/bench_prefill.py --pruners fastv,tome --out fastv_tome.md   # the page without --out has them all
    python tools/bench_prefill.py --shape llava-1.5-7b --device cuda

Weights, pixels and text are random, so nothing is downloaded; the vision transformer has a class token, a grid of
24 x 24 and hands over its last block (LLaVA-1.5 the last but one, but some pruners read the last). The pruners are
those of models/pruners, or only the ones that --pruners names; a budget that one's cuts cannot meet as tokens after the
last cut is tried as an average over layers, and a pruner that refuses both stays in the table with its reason.

A timed prefill is everything from pixels to the logits of the first token. Encoder: its forward pass, with what is
scored and cut inside; LLM: the rest. Scoring is the time under the pruner less the time of a bare cut: the same counts
at the same places, kept places known beforehand, no signals read, nothing merged. Pruned, bare and unpruned prefill
follow each other, and all settings take turns in every repeat, so that what else the machine does falls on all of them;
ratios and differences are medians of those within a repeat. FLOPs are multiply-accumulates of blocks and layers without
scoring, but with layers that a method runs twice by its definition (SGL guided by the model itself: those behind the
cut): 4nD^2 + 2n^2D + 3nDm in a decoder layer of n tokens, D wide, m inside its MLP (2nDm in the encoder, whose MLP has
no gate; n there counts the class token).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlm.create import create, names
from vlm.evaluation.stand_in import prompt, stand_in
from vlm.models.encoder import ImageSpec, TimmEncoder
from vlm.models.errors import ModelError
from vlm.models.program.ahead import Watch
from vlm.models.program.attach import attach
from vlm.models.program.program import Program, Select, Selector, Tokens, check
from vlm.models.program.shape import DecoderShape
from vlm.models.vision_language import Inputs, VisionLanguageModel
from vlm.recipe import Method, RecipeError

TEXT, BUDGETS = 64, (192, 128, 64)
SIDE, PATCH = 336, 14
RESULTS = Path(__file__).parent / "results" / "bench_prefill.md"


class EncoderShape(NamedTuple):
    """Width, blocks and heads of the vision transformer, whose MLP is four times as wide."""

    width: int
    blocks: int
    heads: int


Shape = tuple[EncoderShape, DecoderShape]
SHAPES: dict[str, Shape] = {
    "narrow": (EncoderShape(128, 6, 4), DecoderShape(16, 256, 688, 8, 32)),
    "llava-1.5-7b": (EncoderShape(1024, 24, 16), DecoderShape(32, 4096, 11008, 32, 128)),
}


class Times(NamedTuple):
    """Seconds of one prefill."""

    encoder: float
    total: float


Refusal = tuple[str, str, str]  # pruner, budget, reason
Triples = list[tuple[Times, Times, Times]]  # of every repeat: under the pruner, under its bare cut, unpruned


class Setting(NamedTuple):
    """One row: a pruner with a budget, its program, and the bare cut with the same counts."""

    pruner: str
    keep: str
    program: Program
    bare: Program
    visual_tokens: list[float]
    flops: float


def build(shape: Shape, device: torch.device) -> VisionLanguageModel:
    width, blocks, heads = shape[0]
    tower = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=width, depth=blocks, num_heads=heads, num_classes=0, global_pool=""
    )
    vision = TimmEncoder(tower, ImageSpec(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return stand_in(shape[1], vision).to(device, dtype).eval()


# What a pruner does to counts, and the bare cut that does the same


def recorded(program: Program, counts: dict[str, int]) -> Program:
    """The program, entering in ``counts`` how many visual tokens each of its cuts leaves."""

    def wrap(place: str, op: Select) -> Select:
        own = op.selector

        def choose(tokens: Tokens, count: Tensor) -> Tensor:
            kept = own.choose(tokens, count)
            counts[place] = int((kept & tokens.valid).sum())
            return kept

        def reduce(tokens: Tokens, kept: Tensor, count: Tensor) -> Any:
            assert own.reduce is not None
            reduced = own.reduce(tokens, kept, count)
            counts[place] = int(reduced.valid.sum())
            return reduced

        return replace(op, selector=own._replace(choose=choose, reduce=reduce if own.reduce is not None else None))

    return tuple((site, wrap(str(site), op) if isinstance(op, Select) else op) for site, op in program)


def bare(program: Program, counts: dict[str, int]) -> Program:
    """Cuts at the same places that leave as many tokens: marks are made once and nothing is read or merged."""

    def select(place: str, op: Select) -> Select:
        marks: dict[int, Tensor] = {}

        def choose(tokens: Tokens, count: Tensor) -> Tensor:
            length = tokens.x.shape[1]
            if length not in marks:
                at = torch.arange(length, device=tokens.x.device)
                marks[length] = (((at + 1) * counts[place] // length) > (at * counts[place] // length))[None]
            return marks[length]

        return replace(op, selector=Selector(choose), exact=False, weigh=False)

    kept = [(site, op) for site, op in program if isinstance(op, Select) and str(site) in counts]
    return tuple((site, select(str(site), op)) for site, op in kept)


# FLOPs


def encoder_flops(model: VisionLanguageModel, shape: EncoderShape, counts: dict[str, int]) -> float:
    """Of all blocks that run, with what the cuts leave of the tokens (and the class token)."""
    total, (rows, columns), width = 0.0, model.vision.grid, shape.width
    patches: int = rows * columns
    for block in range(len(model.vision.blocks)):
        n = patches + 1
        patches = counts.get(f"vit.mid[{block}]", patches)
        total += 4 * n * width**2 + 2 * n**2 * width + 2 * (patches + 1) * width * 4 * width
        patches = counts.get(f"vit.after[{block}]", patches)
    return total


# Settings


def settings(
    model: VisionLanguageModel, inputs: Inputs, shape: Shape, pruners: Sequence[str]
) -> tuple[list[Setting], list[Refusal]]:
    """The pruners with every budget; and those that refuse: name, budget, reason."""
    found: list[Setting] = []
    refused: list[Refusal] = []
    for name, budget in [("none", 576)] + [(name, budget) for name in pruners for budget in BUDGETS]:
        try:
            keep, program = ("576", ()) if name == "none" else _program(model, name, budget)
            found.append(_setting(model, inputs, shape, name, keep, program))
        except (ModelError, RecipeError) as error:
            refused.append((name, str(budget), str(error)))
    return found, refused


def _program(model: VisionLanguageModel, name: str, budget: int) -> tuple[str, Program]:
    """The budget as it was met and the program of the pruner; the first refusal when it can be met in no way."""
    refusal: Exception | None = None
    for keep, words in ((budget, f"{budget}"), ({"average": budget}, f"average {budget}")):
        try:
            program = create("prune", Method.model_validate({"use": name, "keep": keep})).program(model.facts)
            check(program, model.facts)
            return words, program
        except (ModelError, RecipeError) as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _setting(
    model: VisionLanguageModel, inputs: Inputs, shape: Shape, name: str, keep: str, program: Program
) -> Setting:
    counts: dict[str, int] = {}
    visual = _visual_tokens(model, inputs, recorded(program, counts))
    naked = bare(program, counts)
    if _visual_tokens(model, inputs, naked) != visual:
        raise AssertionError(f"{name} {keep}: its bare cut leaves other counts, so times cannot be compared")
    layers = visual + _run_twice(program, visual)
    flops = encoder_flops(model, shape[0], counts) + sum(shape[1].flops(n + TEXT) for n in layers)
    return Setting(name, keep, program, naked, visual, flops)


def _run_twice(program: Program, visual: list[float]) -> list[float]:
    """Visual tokens of the layers that a program runs a second time to watch them; of the last one, only queries and
    keys, which count as nothing."""
    cut = Watch(program, len(visual)).cut
    return visual[:1] * (len(visual) - 1 - cut) if cut > 0 else []


def _visual_tokens(model: VisionLanguageModel, inputs: Inputs, program: Program) -> list[float]:
    """Visual tokens of each layer in a prefill under ``program``."""
    with torch.inference_mode(), attach(model, program):
        return model.prefill(inputs)[1].run.visual_tokens(model.facts.layers)


# Time


def timed(model: VisionLanguageModel, inputs: Inputs, program: Program) -> Times:
    """One prefill under ``program``."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if inputs.tokens.is_cuda else lambda: None
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        synchronize()
        stamps.append(time.perf_counter())

    hooks = [model.vision.register_forward_pre_hook(stamp), model.vision.register_forward_hook(stamp)]
    try:
        with torch.inference_mode(), attach(model, program):
            stamp()
            model.prefill(inputs)
            stamp()
    finally:
        for hook in hooks:
            hook.remove()
    begins, ends = stamps[1:-1:2], stamps[2:-1:2]  # a pass aside encodes once more
    return Times(sum(ends) - sum(begins), stamps[-1] - stamps[0])


def measure(model: VisionLanguageModel, inputs: Inputs, chosen: list[Setting], repeats: int) -> list[Triples]:
    """Times of each setting, of its bare cut and of the unpruned model right after, in every repeat; one more before
    warms up."""
    times: list[Triples] = [[] for _ in chosen]
    for repeat in range(repeats + 1):
        for setting, own in zip(chosen, times, strict=True):
            pruned, naked, plain = (timed(model, inputs, program) for program in (setting.program, setting.bare, ()))
            if repeat:
                own.append((pruned, naked, plain))
    return times


# The page


def table(chosen: list[Setting], times: list[Triples], refused: list[Refusal]) -> list[str]:
    lines = [
        "| pruner | keep | visual tokens: average | final | encoder ms | LLM ms | scoring ms | total ms "
        "| times faster | FLOPs allow | reached |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    middle = statistics.median
    for setting, own in zip(chosen, times, strict=True):
        encoder, total = middle(t.encoder for t, _, _ in own), middle(t.total for t, _, _ in own)
        llm, scoring = middle(t.total - t.encoder for t, _, _ in own), middle(t.total - b.total for t, b, _ in own)
        faster = middle(plain.total / t.total for t, _, plain in own)
        allowed = chosen[0].flops / setting.flops
        average = sum(setting.visual_tokens) / len(setting.visual_tokens)
        spent = "" if setting.pruner == "none" else f"{1e3 * scoring:.1f}"
        cells = [setting.pruner, setting.keep, f"{average:.0f}", f"{setting.visual_tokens[-1]:.0f}"]
        cells += [f"{1e3 * encoder:.1f}", f"{1e3 * llm:.1f}", spent, f"{1e3 * total:.1f}"]
        cells += [f"{faster:.2f}", f"{allowed:.2f}", f"{faster / allowed:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | {budget} | refused: {reason} ||||||||| " for name, budget, reason in refused]
    return [line.rstrip() for line in lines]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--layers", type=int, help="of the decoder, other than the shape has")
    parser.add_argument("--width", type=int, help="of the decoder, a multiple of its heads' width")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--pruners", help="only these, by name with commas between; all of the folder by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table, as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    torch.manual_seed(0)
    encoder, decoder = SHAPES[arguments.shape]
    if arguments.width:
        heads, inner = arguments.width // decoder.head_dim, int(arguments.width * decoder.mlp / decoder.width)
        decoder = replace(decoder, width=arguments.width, mlp=inner, kv_heads=heads)
    decoder = replace(decoder, layers=arguments.layers or decoder.layers)
    model = build((encoder, decoder), device)
    inputs = prompt(TEXT, device, SIDE)
    inputs = inputs._replace(images=inputs.images.to(next(model.parameters()).dtype))
    pruners = names("prune") if arguments.pruners is None else arguments.pruners.split(",")
    if unknown := sorted(set(pruners) - set(names("prune"))):
        parser.error(f"--pruners: expected some of {', '.join(names('prune'))}; found {', '.join(unknown)}")
    chosen, refused = settings(model, inputs, (encoder, decoder), pruners)
    times = measure(model, inputs, chosen, arguments.repeats)
    text = "\n".join([*head(arguments, device, model, (encoder, decoder)), *table(chosen, times, refused)]) + "\n"
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text)
    print(text)


def head(arguments: Any, device: torch.device, model: nn.Module, shape: Shape) -> list[str]:
    encoder, decoder = shape
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    packages = f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    given = {key: value for key, value in vars(arguments).items() if value is not None and key != "out"}
    options = [f"--{key} {value}" for key, value in given.items()]
    return [
        "# Prefill under pruners",
        "",
        f"`python tools/bench_prefill.py {' '.join(options)}`",
        "",
        f"* {datetime.now(UTC):%Y-%m-%d}; {machine(device)}; {packages}, {dtype}",
        f"* {millions:.1f} M parameters: {encoder.blocks} blocks of width {encoder.width}, {decoder.layers} layers of "
        f"width {decoder.width}; 576 visual + {TEXT} text tokens, batch 1; {arguments.repeats} interleaved repeats",
        "* Times are medians, from pixels to the first logits; scoring is the time above a bare cut to the same counts",
        "* Times faster: unpruned by pruned, encoder and all. FLOPs allow: the same ratio of multiply-accumulates, "
        "without scoring but with layers that are run twice (by SGL, guided by the model itself). Reached: one by the "
        "other.",
        "",
    ]


if __name__ == "__main__":
    main()
