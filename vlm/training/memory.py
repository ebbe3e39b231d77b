"""Two switches of the engines below: activations computed again in the backward pass, and compiled decoder blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.recipe import Recipe
from vlm.training.errors import TrainingError


def check_switches(recipe: Recipe) -> None:
    """Raises TrainingError for compiled blocks under a program, whose hooks and changing lengths break their graphs."""
    if recipe.run.compile and (recipe.prune or recipe.mitigate):
        method = recipe.prune or recipe.mitigate[0]
        raise TrainingError(
            f"run.compile: compiled blocks take no program in training; found {method.title}: set run.compile=false"
        )


@contextmanager
def switched(recipe: Recipe, model: Any) -> Iterator[None]:
    """The model as the recipe's switches say, for the time of a stage. Names of weights stay as they are."""
    check_switches(recipe)
    if recipe.run.checkpoint_activations:
        recompute(model, True)
    layers: list[Any] = list(model.decoder.layers) if recipe.run.compile else []
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        if recipe.run.checkpoint_activations:
            recompute(model, False)


def recompute(model: nn.Module, on: bool) -> None:
    """Keep only what enters each block and compute the rest again in the backward pass: Transformers' layers and timm's
    blocks do it themselves. The engine's sequence and selection travel with a layer, so a cut is the same again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
            if on:
                module.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                module.gradient_checkpointing_disable()
        elif hasattr(module, "set_grad_checkpointing"):
            module.set_grad_checkpointing(on)  # type: ignore[operator]


def recompute_frozen(decoder: Any) -> None:
    """Let the layers of a frozen decoder compute again too: Transformers asks whether the layer itself is in training
    mode. What is inside it (attention, dropout) stays in evaluation mode."""
    for layer in decoder.layers:
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
