"""Time per generated token under every mitigator beside plain decoding, at LLaVA-1.5's counts: 576 visual + 64 text.

    python -m tools.bench_decode [--shape narrow --batch 1 8 --repeats 5 --steps 16 --threads 1]
    python -m tools.bench_decode --shape llava-1.5-7b --device cuda
    python -m tools.bench_decode --shape overhead

Weights, pixels and text are random, so nothing is downloaded. ``narrow`` is so wide that products of matrices take most
of a step on a CPU, as in a real model; ``overhead`` is the other extreme, as many layers as LLaVA-1.5-7B and hardly any
work in them: what a program costs in Python and in launched operations, which is what a fast GPU is kept waiting by.

Rows are the mitigators that act on attention, heads, the residual stream or logits with their own options, where those
need no calibration; what acts on the prompt or ranks beams costs no part of a greedy step and is left out by name.
``eager maps`` is plain decoding through Transformers' eager attention whose maps are kept, as the papers' codes decode.

A timed step is one token for each row of the batch, from logits to logits, the chosen token known at the end. Every
step under a method is followed by the same step of plain decoding, so that what else the machine does falls on both;
a ratio is the median over a repeat's steps by the median of the plain steps between them, and of these the median. The
batch is one prompt over and over, so no row is padded. Prefill is everything before the first token, passes that a
method makes before the answer included; it is run for one row.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from tools.bench_prefill import PATCH, SIDE, TEXT, machine
from vlm.create import create, names
from vlm.evaluation.stand_in import prompt, stand_in
from vlm.models.encoder import ImageSpec, TimmEncoder
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.program import Inside, Program, Rewrite
from vlm.models.program.shape import DecoderShape
from vlm.models.program.streams import Streams, open_streams
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Method, RecipeError

RESULTS = Path(__file__).parent / "results" / "bench_decode.md"
SHAPES = {
    "narrow": (DecoderShape(8, 1024, 2752, 8, 128), 4096),
    "overhead": (DecoderShape(32, 64, 128, 4, 16), 1000),
    "llava-1.5-7b": (DecoderShape(32, 4096, 11008, 32, 128), 32064),
}
# What stands for a calibration or a tokenizer; the cost does not depend on it.
OPTIONS: dict[str, dict[str, Any]] = {"act": {"calibration": None}, "icd": {"tokens": [5, 6, 7, 8, 9]}}
EAGER = "vlm_bench_eager_maps"
_MAPS: list[Tensor] = []


class Row(NamedTuple):
    """A way to decode: its name, what it acts on, and the block in which the model decodes so."""

    name: str
    level: str
    within: Callable[[], Any]
    rewrites: list[Rewrite]


class Measured(NamedTuple):
    """Of each repeat: the median seconds of a step, and of the plain steps between."""

    own: list[float]
    plain: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.own, self.plain, strict=True))


# The model and the rows


def build(shape: DecoderShape, vocabulary: int, device: torch.device) -> VisionLanguageModel:
    tower = VisionTransformer(SIDE, PATCH, embed_dim=128, depth=4, num_heads=4, num_classes=0, global_pool="")
    vision = TimmEncoder(tower, ImageSpec(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = stand_in(shape, vision, vocabulary).to(device, dtype).eval()
    model.tokenize, model.detokenize = lambda text: [5], lambda ids: "table"  # any word counts as content
    return model


def eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' eager attention, its map kept until the pass ends, as when a caller asked for maps."""
    out, weights = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if module.layer_idx == 0:
        _MAPS.clear()
    _MAPS.append(weights)
    return out, None


@contextmanager
def with_maps(model: VisionLanguageModel) -> Iterator[None]:
    """The model decodes through eager attention in this block."""
    language: Any = model.language
    before = language.config._attn_implementation
    language.set_attn_implementation(EAGER)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


def rows_of(model: VisionLanguageModel) -> tuple[list[Row], Mapping[str, str]]:
    """Every row, and what is left out with the reason."""
    rows = [
        Row("plain", "", lambda: attach(model, ()), []),
        Row("eager maps", "attention", lambda: with_maps(model), []),
    ]
    left: dict[str, str] = {}
    for name in names("mitigate"):
        try:
            method = create("mitigate", Method.model_validate({"use": name, **OPTIONS.get(name, {})}))
            program: Program = method.program(model.facts)
        except (ModelError, RecipeError) as error:
            left[name] = str(error).splitlines()[0]
            continue
        acts = [(site, op) for site, op in program if isinstance(op, Inside | Rewrite)]
        if not acts:
            left[name] = f"acts at {program[0][0]}" if program else "changes nothing with its own options"
            continue
        level = {"attn": "attention", "heads": "heads", "resid": "residual"}.get(acts[0][0].name, "logits")
        rewrites = [op for _, op in program if isinstance(op, Rewrite)]
        rows.append(Row(name, level, lambda program=program: attach(model, program), rewrites))
    return rows, left


# Time


def timed(device: torch.device, act: Callable[[], Any]) -> tuple[Any, float]:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    made = act()
    wait()
    return made, time.perf_counter() - start


@torch.inference_mode()
def opened(model: VisionLanguageModel, rows: list[Row], repeats: int) -> tuple[list[Streams], list[float]]:
    """The streams of each row after the prompt (one prompt), and the median seconds that took after a warm-up."""
    device = next(model.parameters()).device
    inputs = prompt(TEXT, device, SIDE, model.language.config.vocab_size)
    inputs = inputs._replace(images=inputs.images.to(next(model.parameters()).dtype))
    seconds: list[list[float]] = [[] for _ in rows]
    streams: list[Streams] = []
    for repeat in range(repeats + 1):
        streams = []
        for row, own in zip(rows, seconds, strict=True):
            with row.within():
                made, took = timed(device, lambda: open_streams(model, inputs))
            streams.append(Streams(model, *made))
            if repeat:
                own.append(took)
    return streams, [statistics.median(own) for own in seconds]


@torch.inference_mode()
def measure(rows: list[Row], prompts: list[Streams], batch: int, repeats: int, steps: int) -> list[Measured]:
    """Each row's steps between those of plain decoding, rows in turn in every repeat; the first step of each warms up,
    and so does one more repeat."""
    found = [Measured([], []) for _ in rows]
    device = prompts[0].logits["main"].device
    index = torch.zeros(batch, dtype=torch.long, device=device)
    for repeat in range(repeats + 1):
        for row, prompted, into in zip(rows, prompts, found, strict=True):
            own, plain = prompted.take_rows(index), prompts[0].take_rows(index)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(steps + 1):
                for one, streams, seconds in ((row, own, times[0]), (rows[0], plain, times[1])):
                    with one.within():
                        seconds.append(timed(device, lambda: step(streams, one.rewrites))[1])  # noqa: B023
            if repeat:
                into.own.append(statistics.median(times[0][1:]))
                into.plain.append(statistics.median(times[1][1:]))
    return found


def step(streams: Streams, rewrites: list[Rewrite]) -> list[int]:
    """One token for each row of the batch."""
    token = streams.rewritten(rewrites).argmax(-1)
    streams.step(token)
    return token.tolist()


# The page


def table(
    rows: list[Row], prefill: list[float], by_batch: Mapping[int, list[Measured]], left: Mapping[str, str]
) -> list[str]:
    cells = ["row", "acts on", "prefill ms"]
    for batch in by_batch:
        cells += [f"batch {batch}: ms per step", "times plain", "least, most"]
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    for number, row in enumerate(rows):
        cells = [row.name, row.level, f"{1e3 * prefill[number]:.0f}"]
        for found in by_batch.values():
            one = found[number]
            each = [a / b for a, b in zip(one.own, one.plain, strict=True)]
            cells += [
                f"{1e3 * statistics.median(one.own):.2f}",
                f"{one.ratio:.3f}",
                f"{min(each):.2f}, {max(each):.2f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "Left out:", "", *(f"* {name}: {reason}" for name, reason in left.items())]


def head(arguments: Any, device: torch.device, shape: DecoderShape, vocabulary: int) -> list[str]:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    kept = {key: value for key, value in vars(arguments).items() if value is not None and key != "out"}
    words = [f"--{key} {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in kept.items()]
    return [
        "# Decoding under mitigators",
        "",
        f"`python -m tools.bench_decode {' '.join(words)}`",
        "",
        f"* {datetime.now(UTC):%Y-%m-%d}; {machine(device)}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {dtype}",
        f"* {shape.layers} layers of width {shape.width}, vocabulary {vocabulary}; 576 visual + {TEXT} text tokens + "
        f"{arguments.steps} generated; {arguments.repeats} repeats in turns",
        "* Times plain: a step by the plain step beside it, so 1.05 costs 5 %; the row `plain` is plain against itself "
        "and shows the noise. Least and most are of the repeats. Methods on logits run a second stream where they "
        "compare contexts.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--layers", type=int, help="other than the shape has")
    parser.add_argument("--width", type=int, help="a multiple of its heads' width")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="timed tokens of each repeat")
    parser.add_argument("--only", nargs="+", help="mitigators, without the others")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table, as Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    torch.manual_seed(0)
    shape, vocabulary = SHAPES[arguments.shape]
    if arguments.width:
        inner = int(arguments.width * shape.mlp / shape.width)
        shape = replace(shape, width=arguments.width, mlp=inner, kv_heads=arguments.width // shape.head_dim)
    shape = replace(shape, layers=arguments.layers or shape.layers)
    model = build(shape, vocabulary, device)
    rows, left = rows_of(model)
    if arguments.only:
        rows = rows[:2] + [row for row in rows[2:] if row.name in arguments.only]
    prompts, prefill = opened(model, rows, min(arguments.repeats, 2))
    by_batch = {batch: measure(rows, prompts, batch, arguments.repeats, arguments.steps) for batch in arguments.batch}
    text = "\n".join([*head(arguments, device, shape, vocabulary), *table(rows, prefill, by_batch, left)]) + "\n"
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text)
    print(text)


AttentionInterface.register(EAGER, eager)
AttentionMaskInterface.register(EAGER, eager_mask)

if __name__ == "__main__":
    main()
