"""Decoder layers run before their turn: what they would see of a sequence that a cut is about to shorten."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.program.cutting import given
from vlm.models.program.program import EditBlock, Inside, Program, Select, needs_of
from vlm.models.program.run import Run
from vlm.models.program.signals import Attention, Given

PROBE = "vlm_probe"


class Stop(Exception):
    """Raised by the attention function to leave a layer that was run for its queries and keys only."""

    def __init__(self, q: Tensor, k: Tensor, scale: float | None) -> None:
        super().__init__()
        self.q, self.k, self.scale = q, k, scale


def probe(layer: Any, hidden: Float[Tensor, "batch length width"], kwargs: Mapping[str, Any]) -> Stop:
    """Queries and keys of a layer, which is run up to its attention; the keyword arguments are those of its turn."""
    try:
        with torch.no_grad():
            layer(hidden.detach(), **{**kwargs, **_NO_CACHE, PROBE: True})
    except Stop as stop:
        return stop
    raise AssertionError("a decoder layer that calls no attention function")


def run_on(layers: Sequence[nn.Module], hidden: Float[Tensor, "batch length width"], kwargs: Mapping[str, Any]) -> Stop:
    """Run decoder layers beside the pass under way, without gradient and cache; of the last one, queries and keys."""
    *first, last = layers
    hidden = hidden.detach()
    cuda = [hidden.device] if hidden.is_cuda else []
    # A layer that is computed again for its gradient does not come here again, and must draw the dropout it drew.
    with torch.no_grad(), torch.random.fork_rng(cuda, enabled=any(layer.training for layer in layers)):
        for layer in first:
            out = layer(hidden, **{**kwargs, **_NO_CACHE})
            hidden = out[0] if isinstance(out, tuple) else out
        return probe(last, hidden, kwargs)


_NO_CACHE: Mapping[str, Any] = {"past_key_values": None, "use_cache": False}


class Watch:
    """Scores from outside that the first cut inside the decoder wants and that watching the pass itself gives as well:
    up to that cut as the layers run, then by :func:`run_on`. None where anything acts on the pass before that cut."""

    def __init__(self, program: Program, layers: int) -> None:
        self.cut = -1
        self.signals: tuple[Given, ...] = ()
        acts = [(site, op) for site, op in program if isinstance(op, Select | Inside | EditBlock)]
        cuts = {site.layer: op for site, op in acts if isinstance(op, Select) and site.name == "llm.before"}
        first = min(cuts, default=0)
        if first > 0 and all(site.name in _IN_DECODER and site.layer >= first for site, _ in acts):
            wanted = needs_of(cuts[first], layers)
            self.signals = tuple(s for s in wanted if isinstance(s, Given) and s.watch is not None)
        if self.signals:
            self.cut = first

    def due(self, run: Run, layer: int) -> bool:
        """Whether this layer's attention has a say: not in a layer that is computed again for its gradient."""
        return run.prompt and layer < self.cut and self.cut not in run.kept

    def see(self, run: Run, layer: int, seen: Attention) -> None:
        if self.due(run, layer):
            self._show(run, layer, seen)

    def finish(self, engine: Any, hidden: Tensor, kwargs: Mapping[str, Any], run: Run) -> None:
        """Watch the layers from the cut on, as they are without it, and enter the scores in ``run``."""
        last = len(engine.decoder.layers) - 1
        engine.observer = lambda layer, seen: self._show(run, layer, seen)  # the program rests
        try:
            stop = run_on(list(engine.decoder.layers)[self.cut :], hidden, kwargs)
        finally:
            engine.observer = None
        with torch.no_grad():
            self._show(run, last, engine.seen_by(run, last, stop))
            for signal in self.signals:
                run.put(signal, given(signal, run.watchers.pop(signal).total, run))

    def _show(self, run: Run, layer: int, seen: Attention) -> None:
        for signal in self.signals:
            if signal not in run.watchers:
                assert signal.watch is not None
                run.watchers[signal] = signal.watch()
            run.watchers[signal](layer, seen)


_IN_DECODER = ("llm.before", "attn", "heads", "resid")
