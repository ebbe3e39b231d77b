"""Which implementation of an operation runs here, and why the others do not.

Every operation lists its implementations best first, each with a test that returns ``None`` when it can run
or the reason why not. There is no silent fallback: a named implementation that cannot run raises, ``"auto"``
takes the first that can, and :func:`explain` says both.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Implementation(NamedTuple):
    """One way to compute an operation; ``blocked(device)`` is ``None`` or the reason it cannot run there."""

    name: str
    run: Callable
    blocked: Callable[[torch.device], str | None] = lambda device: None


class Choice(NamedTuple):
    """What :func:`explain` returns: the chosen name, and for every other implementation the reason."""

    chosen: str
    others: dict[str, str]


def choose(op: str, implementations: Sequence[Implementation], impl: str, device: torch.device) -> Implementation:
    """The implementation that ``impl`` names, or the first that runs on ``device`` for ``"auto"``.

    Raises ValueError naming the operation when ``impl`` is unknown or cannot run on ``device``.
    """
    for candidate in implementations:
        if impl not in ("auto", candidate.name):
            continue
        reason = candidate.blocked(device)
        if reason is None:
            return candidate
        if impl != "auto":
            raise ValueError(f"{op}: impl {impl!r} cannot run on {device}: {reason}")
    known = ", ".join(["auto", *(c.name for c in implementations)])
    raise ValueError(f"{op}: impl must be one of {known}; found {impl!r}")


def explain(op: str, implementations: Sequence[Implementation], device: torch.device) -> Choice:
    """What ``impl="auto"`` runs on ``device``, and why each other implementation is not chosen."""
    chosen = choose(op, implementations, "auto", device)
    others = {
        c.name: c.blocked(device) or f"{chosen.name} comes first" for c in implementations if c.name != chosen.name
    }
    return Choice(chosen.name, others)
