"""What a prompt costs under a program, measured: tokens of each layer, FLOPs, cache bytes that are held, seconds.

Counts are those of the pass itself (the layouts and caches that it left), so they are right whatever the program does.
FLOPs are the language model's alone, without scoring; scoring is in the seconds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from vlm.models.base import BaseVlm
from vlm.models.program.attach import attach
from vlm.models.program.decode import Decoder, generate, open_streams
from vlm.models.program.program import Program
from vlm.models.program.run import Run
from vlm.models.program.schedule import BudgetReport, report
from vlm.models.program.shape import DecoderShape

REPEATS, REPEATED_ANSWERS = 5, 3  # of a timed prefill, of a timed answer
STEPS = 8  # tokens after the first of a timed answer


def run_report(run: Run, shape: DecoderShape) -> BudgetReport:
    """The mean over the batch of what each sample costs; padding costs nothing."""
    layouts = [run.layouts[run.stage(layer)] for layer in range(shape.layers)]
    visual = torch.stack([layout.visual.sum(1) for layout in layouts], 1).tolist()  # [B][layers]
    text = (layouts[0].valid & ~layouts[0].visual).sum(1).tolist()
    each = [report(counts, words, shape) for counts, words in zip(visual, text, strict=True)]
    mean = report(run.visual_tokens(shape.layers), fmean(text), shape, run.cached_tokens(shape.layers))
    return replace(mean, flops=fmean(one.flops for one in each))  # FLOPs of the mean length would be too few


@torch.inference_mode()
def prompt_cost(model: BaseVlm, inputs: Any) -> dict[str, Any]:
    """Mean cost of a prompt of ``inputs`` under the attached program, summed over its decode streams.

    ``kv_bytes_per_prompt`` counts entries that are held after the prompt, or after the first generated token where
    a policy of decoding steps then holds fewer. ``kv_bytes_allocated`` is the size of the cache's tensors, in which
    shorter prompts of the batch are padded.
    """
    shape = model.facts.shape
    assert shape is not None  # every model of ours tells it
    logits, streams = open_streams(model, inputs)
    reports = {name: run_report(stream.run, shape) for name, stream in streams.items()}
    if model.engine is not None and model.engine.evict_step is not None:
        for name, stream in streams.items():
            model.step(stream, logits[name].argmax(-1))
            held = tuple(map(min, reports[name].held, stream.run.cached_tokens(shape.layers)))
            reports[name] = replace(reports[name], held=held, kv_bytes=sum(map(shape.kv_bytes, held)))
    tensors = [t for s in streams.values() for layer in s.cache.layers for t in _states(layer)]
    main = reports["main"]
    return {
        "visual_tokens": {
            "before": float(model.visual_counts(inputs).float().mean()),
            "after": main.final,
            "after_layer": main.after_layer,
            "average": main.average,
            "per_layer": list(main.visual),
        },
        "text_tokens": main.text,
        "llm_flops_per_prompt": sum(one.flops for one in reports.values()),
        "kv_bytes_per_prompt": sum(one.kv_bytes for one in reports.values()),
        "kv_bytes_allocated": sum(t.nbytes for t in tensors) / len(logits["main"]),
        "kv_entries_per_layer": [sum(layer) for layer in zip(*(one.held for one in reports.values()), strict=True)],
        "streams": len(streams),
    }


def _states(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


@torch.inference_mode()
def prefill_seconds(
    model: BaseVlm, inputs: Any, programs: Sequence[Program], repeats: int = REPEATS
) -> list[list[float]]:
    """Seconds of a prefill of ``inputs`` under each program, ``repeats`` times: encoder, scoring and all streams."""
    return _in_turn(model, programs, repeats, lambda number: _timed(model, lambda: open_streams(model, inputs)))


@torch.inference_mode()
def token_seconds(
    model: BaseVlm,
    inputs: Any,
    programs: Sequence[Program],
    decoders: Sequence[Decoder | None],
    repeats: int = REPEATED_ANSWERS,
) -> list[list[float]]:
    """Seconds of each further token of an answer to every prompt of ``inputs`` under each program and its decoder,
    ``repeats`` times.

    From answers of one and of ``STEPS`` more tokens, which no stop ends, so all streams, passes and goings back count.
    """

    def answer(tokens: int, decoder: Decoder | None) -> float:
        return _timed(model, lambda: generate(model, inputs, max_new_tokens=tokens, stop=-1, decoder=decoder))

    def token(number: int) -> float:
        decoder = decoders[number]
        return (answer(1 + STEPS, decoder) - answer(1, decoder)) / STEPS

    return _in_turn(model, programs, repeats, token)


def _in_turn(
    model: BaseVlm, programs: Sequence[Program], repeats: int, measure: Callable[[int], float]
) -> list[list[float]]:
    """What is measured under each program, by its number; they take turns in every repeat, so that what else the
    machine does falls on all of them. One turn before that warms up."""
    found: list[list[float]] = [[] for _ in programs]
    for repeat in range(repeats + 1):
        for number, program in enumerate(programs):
            with attach(model, program):
                value = measure(number)
            if repeat:
                found[number].append(value)
    return found


def _timed(model: BaseVlm, call: Callable[[], Any]) -> float:
    device = next(model.parameters()).device
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
