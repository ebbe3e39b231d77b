"""Arithmetic on next-token logits: contrasts of two contexts, plausibility cuts, early exits from inner layers.

Rows are independent of each other. A token whose logit is -inf is ruled out, and stays so whatever is added to it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least single precision: differences of half-precision logits would be mostly rounding."""
    return x if x.dtype == torch.float64 else x.float()


def keep_only(
    logits: Float[Tensor, "rows vocab"], plausible: Bool[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    """Rule out all other tokens."""
    return logits.masked_fill(~plausible, -torch.inf)


def plausible(logits: Float[Tensor, "rows vocab"], share: float) -> Bool[Tensor, "rows vocab"]:
    """Tokens at least ``share`` times as likely as the likeliest one; 0 is all that are not ruled out.

    Source: Contrastive Decoding (ACL 2023), section 2.2, adaptive plausibility; used by VCD, ICD, PAI, AGLA and DoLa.
    """
    if share <= 0:
        return logits > -torch.inf
    logits = wide(logits)
    least = logits.amax(-1, keepdim=True) + torch.tensor(share, dtype=logits.dtype).log()
    return logits >= least


def combine(
    main: Float[Tensor, "rows vocab"],
    other: Float[Tensor, "rows vocab"],
    foreign: float | Float[Tensor, "rows 1"],
    own: float | Float[Tensor, "rows 1"] = 1.0,
) -> Float[Tensor, "rows vocab"]:
    """``own * main + foreign * other``; what ``main`` rules out stays ruled out."""
    main, other = wide(main), wide(other)
    there = main > -torch.inf
    return keep_only(own * main.masked_fill(~there, 0) + foreign * other, there)


def contrast(
    main: Float[Tensor, "rows vocab"],
    other: Float[Tensor, "rows vocab"],
    weight: float | Float[Tensor, "rows 1"],
    cut: float = 0.0,
) -> Float[Tensor, "rows vocab"]:
    """``main + weight * (main - other)`` over the tokens that are plausible in ``main``.

    What one context makes likelier than the other becomes likelier still. Adding a number to all logits of a row of
    either changes no probability, so logits serve as well as log-probabilities. ``cut``: see :func:`plausible`.
    """
    return keep_only(combine(main, other, -weight, 1 + weight), plausible(main, cut))


def largest(logits: Float[Tensor, "rows vocab"], count: int) -> Bool[Tensor, "rows vocab"]:
    """The ``count`` likeliest tokens (and what is as likely as the last of them)."""
    return logits >= logits.topk(min(count, logits.shape[-1])).values[..., -1:]


def nucleus(logits: Float[Tensor, "rows vocab"], mass: float) -> Bool[Tensor, "rows vocab"]:
    """The fewest likeliest tokens that have ``mass`` of the probability, at least one.

    Source: The Curious Case of Neural Text Degeneration (ICLR 2020), section 3.1.
    """
    values, order = wide(logits).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # what likelier tokens have
    chosen = before < mass
    chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def divergence(p: Float[Tensor, "*rows vocab"], q: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """Jensen-Shannon divergence in nats of two distributions that are given as log-probabilities."""
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    terms = [torch.where(x > -torch.inf, x.exp() * (x - middle), 0.0) for x in (p, q)]
    return 0.5 * (terms[0] + terms[1]).sum(-1)


def most_divergent(
    final: Float[Tensor, "rows vocab"], layers: Sequence[Float[Tensor, "rows vocab"]]
) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities of the layer whose distribution is farthest from the final one, for each row.

    Source: DoLa (ICLR 2024), section 2.2. The released code takes one layer for the whole batch.
    """
    last = wide(final).log_softmax(-1)
    each = torch.stack([wide(logits).log_softmax(-1) for logits in layers])  # [layers, rows, vocab]
    best = divergence(each, last.expand_as(each)).argmax(0)  # [rows]
    return each[best, torch.arange(len(best), device=best.device)]


def surest(
    layers: Sequence[Float[Tensor, "rows vocab"]], among: Bool[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows 1"]]:
    """Logits of the layer that gives a token of ``among`` the largest probability, for each row, and that probability.

    Source: DeCo (ICLR 2025), section 4.1.
    """
    each = torch.stack([wide(logits) for logits in layers])  # [layers, rows, vocab]
    peak = each.softmax(-1).masked_fill(~among, 0).amax(-1)  # [layers, rows]
    probability, best = peak.max(0)
    return each[best, torch.arange(len(best), device=best.device)], probability[:, None]
