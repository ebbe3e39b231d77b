"""Pictures for the report: what a program kept, where the answer looked, and what it made up."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.build import decoder_of, program_of
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.base import BaseVlm, Overview
from vlm.models.program.attach import attach
from vlm.models.program.cache import Evict, EvictStep, ReadStep
from vlm.models.program.decode import open_streams
from vlm.models.program.layout import Layout
from vlm.models.program.program import Program, Tap, attn
from vlm.models.program.signals import Received
from vlm.recipe import Recipe


class Gaze:
    """Attention of the answer's rows to each visual token, summed over layers and generated tokens.

    frames: where each sample's image is shown whole; tokens of tiles are not counted.
    """

    def __init__(self, frames: Sequence[Overview | None]) -> None:
        self.frames = frames
        self.heat = [torch.zeros(frame.rows * frame.cols if frame else 0) for frame in frames]

    def __call__(self, value: Tensor, layout: Layout) -> None:
        owner = layout.sample.amax(1)  # of the batch; several beams may be of one row, each counts for its share
        share = 1.0 / owner.bincount(minlength=len(self.heat))
        for row, sample in enumerate(owner.tolist()):
            if (frame := self.frames[sample]) is not None:
                shown, place = frame.places(layout, row)
                seen = (value[row] * shown * share[sample]).float().cpu()
                self.heat[sample].scatter_add_(0, place.cpu(), seen)

    def taps(self, layers: int) -> Program:
        return tuple((attn(layer), Tap(Received(layer), self)) for layer in range(layers))


def kept_places(layout: Layout, row: int, frame: Overview) -> list[int]:
    """Raster indices of the visual tokens of one row of a layout, where its image is shown whole."""
    shown, place = frame.places(layout, row)
    return place[shown].tolist()


@torch.inference_mode()
def draw_pictures(
    recipe: Recipe,
    rows: tuple[Any, ...],
    benches: list[Any],
    model: BaseVlm,
) -> dict[str, Any]:
    """The first pictures of the first benchmark that asks for descriptions, seen under every row."""
    bench = next((bench for bench in benches if hasattr(bench.benchmark, "mentions")), None)
    if bench is None or not recipe.evaluate.pictures:
        return {"items": []}
    chosen = list(range(min(recipe.evaluate.pictures, len(bench.questions))))
    prompts = [bench.prompts[i] for i in chosen]
    whole = model.prefill(bench.ask.inputs(prompts))[1].run.layouts[0]
    frames = [model.overview(whole, sample) for sample in range(len(prompts))]
    views = []
    for row in rows:
        bench.ask.decoder = decoder_of(recipe, row)
        views.append(_view(row, model, bench, prompts, frames, program_of(row, model.facts)))
    items = []
    for i in chosen:
        question = bench.questions[i]
        png, width, height = _png(bench.ask.read(question.image))
        objects = sorted(bench.benchmark.truth_of(question.id))
        items.append(
            {"key": question.image, "png": png, "width": width, "height": height, "objects": objects}
            | {"views": [view[i] for view in views]}
        )
    return {"items": items}


def _view(
    row: Any, model: BaseVlm, bench: Any, prompts: list[Prompt], frames: Sequence[Overview | None], program: Program
) -> list[dict[str, Any]]:
    asker: Asker = bench.ask
    inputs = asker.inputs(prompts)
    gaze = Gaze(frames)
    # Under a cache policy heads hold entries of their own, and nobody can say where all of them looked.
    looks = not any(isinstance(op, Evict | EvictStep | ReadStep) for _, op in program)
    with attach(model, program + gaze.taps(model.facts.layers) if looks else program):
        tokens = asker.generate(prompts)
        layout = open_streams(model, inputs)[1]["main"].run.last
    answers = [text.strip() for text in asker.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    cut = int(layout.visual.sum()) < int(model.visual_counts(inputs).sum())
    return [
        {
            "label": row.title,
            "grid": [frame.rows, frame.cols] if frame else [1, 1],
            "kept": kept_places(layout, i, frame) if cut and frame else None,
            "heat": gaze.heat[i].tolist() if looks else None,
            "answer": answer,
            "mentions": bench.benchmark.mentions(bench.questions[i].id, answer),
        }
        for i, (answer, frame) in enumerate(zip(answers, frames, strict=True))
    ]


def _png(content: bytes) -> tuple[str, int, int]:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode(), *image.size
