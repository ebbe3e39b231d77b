"""Programs: what a pruner, a mitigator or a probe does to a forward pass, as data.

A program is an ordered tuple of (site, op). A site is a named point of the forward pass; an op is one action
there. :mod:`vlm.models.program.attach` is the only module that knows how Transformers is made to do it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import Rule
from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.layout import Layout


@dataclass(frozen=True)
class Site:
    """A named point of the forward pass; ``layer`` for the sites that every layer has."""

    name: str
    layer: int = -1

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"{self.name}[{self.layer}]"


VIT_OUT = Site("vit.out")  # features of each image, before the connector
LLM_IN = Site("llm.in")  # the spliced sequence, before the first decoder layer
LOGITS = Site("logits")  # next-token logits of all streams


def llm_before(layer: int) -> Site:
    """The hidden states that enter decoder layer ``layer`` (after ``layer`` layers)."""
    return Site("llm.before", layer)


def attn(layer: int) -> Site:
    """The attention of decoder layer ``layer``."""
    return Site("attn", layer)


@dataclass(frozen=True)
class Received:
    """Signal: attention that each key of ``layer`` gets from the last row, mean over heads, [batch, keys]."""

    layer: int


@dataclass(frozen=True)
class Peak:
    """Signal: largest absolute value of the state that enters ``layer`` after RMS normalisation without gain,
    over ``dims`` (all dimensions when empty), [batch, keys]. Read on the prompt; generated tokens get 0."""

    layer: int
    dims: tuple[int, ...] = ()


Signal = Received | Peak

Position = Literal["keep", "reindex"]


@dataclass(frozen=True)
class Tokens:
    """What a selector sees: visual tokens in segments (an image at ``vit.out``, a sample inside the LLM).

    seed is an integer that depends on the segment's pixels only, so that random choices do not depend on
    which other samples share the batch.
    """

    x: Float[Tensor, "segments tokens width"]
    valid: Bool[Tensor, "segments tokens"]
    seed: Int[Tensor, " segments"]
    signal: Callable[[Signal], Float[Tensor, "segments tokens"]]


class Selector(NamedTuple):
    """``choose(tokens, count)`` marks ``count[s]`` valid tokens of each segment; ``needs`` are its signals."""

    choose: Callable[[Tokens, Int[Tensor, " segments"]], Bool[Tensor, "segments tokens"]]
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class Select:
    """Op at ``vit.out``, ``llm.in`` and ``llm.before[k]``: keep some visual tokens, drop the rest.

    position: ``"keep"`` leaves the kept tokens their position ids, ``"reindex"`` counts anew.
    """

    keep: Budget
    selector: Selector
    position: Position = "keep"


class Keys(NamedTuple):
    """What a grouping sees of one attention layer: its keys' layout and the signals it asked for."""

    layout: Layout
    signal: Callable[[Signal], Float[Tensor, "batch keys"]]


@dataclass(frozen=True)
class Regroup:
    """Op at ``attn[l]``: reweigh groups of keys by ``rule`` in the rows after the last image token.

    ``groups(keys)`` gives each key its group. Cache and cost of other rows are untouched.
    """

    groups: Callable[[Keys], Int[Tensor, "batch keys"]]
    rule: Rule
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class Rewrite:
    """Op at ``logits``: next-token logits from those of named streams.

    ``streams`` are the contexts besides ``"main"`` that the decoder keeps (``"no_image"``); ``logits(by_stream,
    step)`` gets one [batch, vocab] tensor for each of them and the number of tokens generated so far.
    """

    streams: tuple[str, ...]
    logits: Callable[[Mapping[str, Float[Tensor, "batch vocab"]], int], Float[Tensor, "batch vocab"]]


@dataclass(frozen=True)
class Tap:
    """Op at ``attn[l]``: read a signal and change nothing; ``receive(value, layout of the keys)`` at every pass."""

    signal: Received
    receive: Callable[[Float[Tensor, "batch keys"], Layout], None] = field(compare=False)


Op = Select | Regroup | Rewrite | Tap
Program = tuple[tuple[Site, Op], ...]


def cut(site: Site, keep: Budget, selector: Selector, position: Position = "keep") -> Program:
    """The program of a pruner that cuts once; empty when it keeps everything."""
    return () if keep.everything else ((site, Select(keep, selector, position)),)


class Decoder(NamedTuple):
    """What a method may know of the language model it acts on.

    refuses: what a program may not do to it and why, by the name of a site (``"vit.out"``), of an op (``"Regroup"``)
    or of a position policy (``"reindex"``).
    """

    layers: int
    width: int
    refuses: Mapping[str, str] = MappingProxyType({})


def signals_of(program: Program) -> set[Signal]:
    """All signals that the ops of a program ask for."""
    needs: set[Signal] = set()
    for _, op in program:
        if isinstance(op, Select):
            needs.update(op.selector.needs)
        elif isinstance(op, Regroup):
            needs.update(op.needs)
        elif isinstance(op, Tap):
            needs.add(op.signal)
    return needs


def check(program: Program, decoder: Decoder) -> None:
    """Refuse a program that does not fit ``decoder``. Raises ModelError: site, expected, found."""
    for site, _ in program:
        if site.layer >= decoder.layers or (site.name == "llm.before" and site.layer < 1):
            first = 1 if site.name == "llm.before" else 0
            raise ModelError(f"{site}: the language model has layers {first}..{decoder.layers - 1}; found {site.layer}")
    for site, op in program:
        for what in (site.name, type(op).__name__, getattr(op, "position", "")):
            if what in decoder.refuses:
                raise ModelError(f"{site}: {decoder.refuses[what]}")
    cuts = [site for site, op in program if isinstance(op, Select)]
    for site in cuts:
        if cuts.count(site) > 1:
            raise ModelError(f"{site}: two cuts at one site; found {', '.join(map(str, cuts))}")
    for site, op in program:
        for signal in signals_of(((site, op),)):
            _check_signal(site, signal, decoder, cuts)


def _check_signal(site: Site, signal: Signal, decoder: Decoder, cuts: list[Site]) -> None:
    """Refuse a signal that is not known yet at ``site``, or that was read from another sequence than the site's."""
    if not 0 <= signal.layer < decoder.layers:
        raise ModelError(f"{site}: it asks for {signal}, but layers are 0..{decoder.layers - 1}")
    known = signal.layer <= site.layer if site.name == "attn" else signal.layer < site.layer
    if not known:
        raise ModelError(f"{site}: it asks for {signal}, which is known only after that layer")
    last = site.layer if site.name == "attn" else site.layer - 1
    if between := [cut.layer for cut in cuts if cut.name == "llm.before" and signal.layer < cut.layer <= last]:
        raise ModelError(f"{site}: it asks for {signal}, but a cut at layer {between[0]} came between")


class Method(Protocol):
    """A pruner or a mitigator: a frozen dataclass in a file of its own name; its fields are its recipe options.

    source: paper and section. verified: ``"golden"`` (official numbers), ``"code"``, ``"paper"`` or
    ``"reconstruction"``. A neutral setting compiles to the empty program.
    """

    source: ClassVar[str]
    verified: ClassVar[str]

    def program(self, decoder: Decoder) -> Program: ...
