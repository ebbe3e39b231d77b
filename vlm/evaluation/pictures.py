"""Pictures for the report: what a program kept, where the answer looked, and what it made up."""

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.build import program_of
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.program.attach import attach
from vlm.models.program.decode import open_streams
from vlm.models.program.layout import Layout
from vlm.models.program.program import Program, Tap, attn
from vlm.models.program.signals import Received
from vlm.models.vision_language import VisionLanguageModel
from vlm.recipe import Recipe


class Gaze:
    """Attention of the answer's rows to each visual token, summed over layers and generated tokens.

    Of an image that comes in tiles only the tokens of its whole view are counted.
    """

    def __init__(self, rows: int, grid: tuple[int, int]) -> None:
        self.heat = torch.zeros(rows, grid[0] * grid[1])
        self.grid = grid

    def __call__(self, value: Tensor, layout: Layout) -> None:
        visual = layout.visual & (layout.row < self.grid[0])  # tiles stand below the whole image
        place = (layout.row * self.grid[1] + layout.col).masked_fill(~visual, 0)
        row = layout.sample.amax(1)  # of the batch; several beams may be of one row, each counts for its share
        share = value * visual / row.bincount(minlength=len(self.heat))[row][:, None]
        self.heat.index_put_((row[:, None].cpu(), place.cpu()), share.float().cpu(), accumulate=True)

    def taps(self, layers: int) -> Program:
        return tuple((attn(layer), Tap(Received(layer), self)) for layer in range(layers))


def kept_places(layout: Layout, row: int, grid: tuple[int, int]) -> list[int]:
    """Raster indices of the visual tokens of one row of a layout, in the whole view where an image comes in tiles."""
    visual = layout.visual[row] & (layout.row[row] < grid[0])
    return (layout.row[row] * grid[1] + layout.col[row])[visual].tolist()


@torch.inference_mode()
def draw_pictures(
    recipe: Recipe,
    rows: tuple[Any, ...],
    benches: list[Any],
    model: VisionLanguageModel,
) -> dict[str, Any]:
    """The first pictures of the first benchmark that asks for descriptions, seen under every row."""
    bench = next((bench for bench in benches if hasattr(bench.benchmark, "mentions")), None)
    if bench is None or not recipe.evaluate.pictures:
        return {"items": []}
    chosen = list(range(min(recipe.evaluate.pictures, len(bench.questions))))
    prompts = [bench.prompts[i] for i in chosen]
    views = [_view(row, model, bench, prompts, program_of(row, model.facts)) for row in rows]
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
    row: Any, model: VisionLanguageModel, bench: Any, prompts: list[Prompt], program: Program
) -> list[dict[str, Any]]:
    asker: Asker = bench.ask
    inputs = asker.inputs(prompts)
    grid = model.visual_grid
    gaze = Gaze(len(prompts), grid)
    with attach(model, program + gaze.taps(model.facts.layers)):
        tokens = asker.generate(prompts)
        layout = open_streams(model, inputs)[1]["main"].run.last
    answers = [text.strip() for text in asker.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    cut = int(layout.visual.sum()) < int(model.visual_counts(inputs).sum())
    return [
        {
            "label": row.title,
            "grid": list(grid),
            "kept": kept_places(layout, i, grid) if cut else None,
            "heat": gaze.heat[i].tolist(),
            "answer": answer,
            "mentions": bench.benchmark.mentions(bench.questions[i].id, answer),
        }
        for i, answer in enumerate(answers)
    ]


def _png(content: bytes) -> tuple[str, int, int]:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode(), *image.size
