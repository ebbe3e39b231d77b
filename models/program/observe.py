"""Look at a model's attention in a pass of its own, while whatever program it runs under rests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm.models.program.attach import Engine, Observer, attach
from vlm.models.program.program import Tap, attn
from vlm.models.program.signals import Received


@contextmanager
def observe(model: Any, observer: Observer) -> Iterator[None]:
    """Show ``observer(layer, attention)`` every attention call of the model's decoder in this block, gradient aside.

    A program that is attached to the model rests in the block: passes are those of the bare model. Raises ModelError
    for a decoder whose attention cannot be seen.
    """
    if model.engine is None:
        nothing = Tap(Received(0), lambda value, layout: None)
        with attach(model, ((attn(0), nothing),)), observe(model, observer):
            yield
        return
    with _resting(model.engine, observer):
        yield


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """In this block passes are those of the bare model, whatever program is attached."""
    if model.engine is None:
        yield
        return
    with _resting(model.engine, lambda layer, attention: None):
        yield


@contextmanager
def _resting(engine: Engine, observer: Observer) -> Iterator[None]:
    vision, before = engine.vision, engine.observer
    now = None if vision is None else vision.now
    engine.observer, engine.vision = observer, None
    if vision is not None:
        vision.now = None  # its hooks stay, and let everything pass
    try:
        yield
    finally:
        engine.observer, engine.vision = before, vision
        if vision is not None:
            vision.now = now
