"""Attention sinks: as key groups the first token (ZeroTuning) and whatever else attracts attention (ACT), and the
dimensions of the hidden state by which they are known (VAR)."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.program.layout import Layout
from vlm.models.program.observe import resting

REST, SINK = 0, 1
SHARE = 0.95  # of prompts in which a sink dimension is large


def first_token(layout: Layout) -> Int[Tensor, "batch keys"]:
    """Group SINK for the first token of each sample, REST for all others."""
    return ((layout.valid.long().cumsum(1) == 1) & layout.valid).long()


def attention_sinks(
    received: Float[Tensor, "batch heads keys"], layout: Layout, threshold: float, scaled: bool = False
) -> Bool[Tensor, "batch heads keys"]:
    """Keys of each head whose mean attention, over the prompt's rows that see them, is above the threshold, without the
    first such key (which stays as it is).

    received: attention summed over the prompt's rows, 0 for generated tokens. scaled: the threshold is divided by the
    length of the prompt. Source: ACT (ICML 2024), section 4.1; the scaled form is the paper's, the other the code's.
    """
    prompt = layout.valid & ((layout.source >= 0) | layout.visual)
    rows = prompt.flip(1).cumsum(1).flip(1)  # of the prompt, from each key on
    mean = received / rows.clamp_min(1)[:, None]
    limit = threshold / prompt.sum(1)[:, None, None].to(mean.dtype) if scaled else threshold
    sink = (mean > limit) & prompt[:, None]
    return sink & (sink.long().cumsum(2) > 1)


def chosen_heads(sink: Bool[Tensor, "batch heads keys"], heads: Bool[Tensor, " #heads"]) -> Tensor:
    """Groups [batch, heads, keys]: SINK for the sinks of the chosen heads, REST for everything else."""
    return torch.where(sink & heads.to(sink.device)[:, None], SINK, REST)


@torch.no_grad()
def first_states(model: Any, inputs: Any, layer: int) -> Float[Tensor, "batch width"]:
    """The state of each prompt's first token that enters a decoder layer, in a pass of the bare model."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0])  # [B,L,W]

    handle = model.decoder.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with resting(model):
            _, stream = model.prefill(inputs)
    finally:
        handle.remove()
    first = stream.run.layouts[0].valid.int().argmax(1)
    return found[0][torch.arange(len(first), device=first.device), first]


def sink_dimensions(
    states: Float[Tensor, "prompts width"], tau: float, share: float = SHARE, most: int = 2
) -> tuple[tuple[int, ...], float]:
    """Dimensions in which the first token's state, after RMS normalisation, is above ``tau`` in that share of prompts:
    the ``most`` largest by their mean, in order of their numbers. Also the largest value that any dimension exceeds in
    so many prompts, which is where ``tau`` would have to lie.

    Source: ours, after what VAR (ICLR 2025), appendix A.1, says of massive activations.
    """
    x = states.double()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).abs()
    often = (x > tau).double().mean(0) >= share
    ranked = (x.mean(0) * often).argsort(descending=True)[: min(most, int(often.sum()))]
    exceeded = x.sort(0, descending=True).values[max(-int(-share * len(x) // 1) - 1, 0)].max()
    return tuple(sorted(ranked.tolist())), float(exceeded)
