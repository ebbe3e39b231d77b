"""A trained model as a folder that other programs load, adapters merged into its weights."""

import io
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlm.build import build_collate, build_encoder, build_model, build_tokenizer, for_evaluation
from vlm.data.draw import Draw
from vlm.data.schema import Message, Part, Sample
from vlm.models.errors import ModelError
from vlm.models.lora import merge_adapters
from vlm.models.pretrained import load_pretrained
from vlm.models.processing import load_processor
from vlm.models.saved import load_composed, save_composed
from vlm.recipe import Recipe
from vlm.training.loss import inputs_of
from vlm.training.weights import trained_weights

CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest logit: adapters merged in fp32, or rounded to bf16


def export(recipe: Recipe, folder: Path, verify: bool = True) -> str:
    """Write the run's trained model into an empty ``folder``, and say in one line what a comparison has shown.

    A model ``from`` a checkpoint becomes one of the same kind, with its processor, for Transformers; a composed one a
    folder of ours (:mod:`vlm.models.saved`).

    verify: load it back on the CPU and compare the logits of an answer about a picture with those of the run's own
        model, its adapters not yet merged. It needs memory for a second model.

    Raises ModelError for a folder with something in it, or logits that differ.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"export: {folder} holds something already; expected an empty folder, or none")
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model).cpu()
    batch = _question(recipe, model, tokenizer) if verify else None
    expected = _logits(model, batch)
    merge_adapters(model)
    if recipe.model.origin is None:
        save_composed(model, folder, tokenizer=tokenizer, recipe=recipe.to_yaml())
    else:
        model.model.save_pretrained(folder)
        load_processor(recipe.model.origin.name).save_pretrained(folder)
    if expected is None:
        return "not compared with the run's model"
    again: Any = load_composed(folder).model if recipe.model.origin is None else load_pretrained(folder)
    kind = next(model.parameters()).dtype
    for parameter in again.parameters():  # not buffers: frequencies of rotary positions stay exact
        parameter.data = parameter.data.to(kind)
    return _compare(expected, _logits(again.eval(), batch), CLOSE.get(kind, 5e-2), folder)


def _question(recipe: Recipe, model: Any, tokenizer: Any) -> Any:
    """A batch of one picture, a question and an answer, which every model of a recipe can take."""
    pixels = torch.arange(96 * 128 * 3).mul(2654435761).remainder(256).to(torch.uint8).reshape(96, 128, 3)
    picture = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(picture, "png")
    asked = Message("user", (Part("image", ref=0), Part("text", "What is in this image?")))
    answered = Message("assistant", (Part("text", "There is a cat on the table."),))
    encoder = build_encoder(recipe, model, tokenizer)
    example = encoder(Sample("export", (asked, answered), (picture.getvalue(),)), Draw(0, 0, 0))
    return build_collate(encoder, tokenizer)([example])


@torch.no_grad()
def _logits(model: Any, batch: Any) -> Float[Tensor, "supervised vocab"] | None:
    return None if batch is None else model.supervised(inputs_of(batch), batch.weights).logits.float()


def _compare(expected: Tensor, found: Tensor | None, close: float, folder: Path) -> str:
    assert found is not None and expected.shape == found.shape
    apart, largest = (expected - found).abs().max().item(), expected.abs().max().item()
    said = f"logits of {len(expected)} tokens differ by {apart:.2g} at most; the largest is {largest:.3g}"
    if not apart <= close * max(1.0, largest):  # not a number is no likeness either
        raise ModelError(
            f"export: {folder}: expected the logits of the run's model within {close:g} of the largest when it is "
            f"loaded back; found that {said}; what was written stays for you to look at"
        )
    return f"loaded back: {said}"
