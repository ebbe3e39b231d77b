"""Where in the decoder a program can begin without changing what the model says."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from vlm.models.base import BaseVlm
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.program import Program


@torch.inference_mode()
def first_safe_layer(
    model: BaseVlm,
    batches: Iterable[Any],
    program_at: Callable[[int], Program],
    most: float = 0.003,
    layers: Iterable[int] | None = None,
) -> tuple[int, dict[int, float]]:
    """The first of ``layers`` at which the program leaves the next token's distribution as it is.

    The divergence of a layer is the mean over the prompts of ``KL(p_program || p_model)`` of the token after the
    prompt, in nats; safe is at most ``most`` (VTW: 0.003 for LLaVA-1.5-7B, 0.0005 for 13B, 0.0001 for LLaVA-NeXT-7B,
    over 20 prompts, layers from 5 on). Returns the layer and the divergence of each layer that was tried.

    Raises ModelError when none is safe: it names the best one. Source: VTW (arXiv 2405.05803), section 4.2.
    """
    inputs = list(batches)
    plain = torch.cat([model.prefill(batch)[0] for batch in inputs]).float().log_softmax(-1)
    tried: dict[int, float] = {}
    for layer in range(min(5, model.facts.layers - 1), model.facts.layers) if layers is None else layers:
        with attach(model, program_at(layer)):
            pruned = torch.cat([model.prefill(batch)[0] for batch in inputs]).float().log_softmax(-1)
        tried[layer] = float((pruned.exp() * (pruned - plain)).sum(-1).mean())
        if tried[layer] <= most:
            return layer, tried
    best = min(tried, key=lambda layer: tried[layer])
    raise ModelError(f"no layer with a divergence of at most {most:g}; the least is {tried[best]:.3g}, at layer {best}")
