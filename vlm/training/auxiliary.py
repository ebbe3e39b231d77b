"""Losses that a vision encoder brings itself, beside the objective's: a router that balances its load."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vlm.data.batch import Batch
from vlm.models.encoder import Auxiliary
from vlm.training.loss import Loss


@contextmanager
def noting(model: Any) -> Iterator[Mapping[str, Auxiliary]]:
    """Terms that passes inside note; none where the model's encoder brings no loss of its own, or does not train."""
    encoder: Any = getattr(model, "vision", None)
    if not hasattr(encoder, "auxiliary") or not any(parameter.requires_grad for parameter in encoder.parameters()):
        yield {}
        return
    with encoder.auxiliary() as terms:
        yield terms


def added(loss: Loss, terms: Mapping[str, Auxiliary], batch: Batch) -> Loss:
    """The loss with ``share`` times the mean of each term's values for every unit of its weight, so that a step has the
    weighted mean of its micro-batches' terms; they are logged by name.

    In a batch without images the blank picture that runs in their place counts nothing.
    """
    noted = {name: term for name, term in terms.items() if term.values}
    if not noted:
        return loss
    value, logs, pictures = loss.value, dict(loss.logs), len(batch.images) > 0
    for name, (share, values) in noted.items():
        term = torch.stack(values).mean().to(value.dtype)
        weight = loss.weight.detach() if pictures else 0.0
        value = value + share * weight * term
        if pictures:
            logs[name] = term.detach()
    return Loss(value, loss.weight, logs)
