"""Attention sinks as key groups: the first token (ZeroTuning), and whatever else attracts attention (ACT)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.layout import Layout

REST, SINK = 0, 1


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
