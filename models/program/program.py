"""Programs: what a pruner, a mitigator or a probe does to a forward pass, as data.

A program is an ordered tuple of (site, op). A site is a named point of the forward pass; an op is one action
there. :mod:`vlm.models.program.attach` lowers a program onto a model; what ops may ask for is in
:mod:`vlm.models.program.signals`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.grouped_mass.rules import Rule
from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.cache import Evict, EvictStep, ReadStep
from vlm.models.program.contexts import Context
from vlm.models.program.keys import Keys
from vlm.models.program.layout import Layout
from vlm.models.program.reduce import Reduced
from vlm.models.program.schedule import budgets
from vlm.models.program.signals import Facts, Received, Signal


@dataclass(frozen=True)
class Site:
    """A named point of the forward pass; ``layer`` for the sites that every layer has."""

    name: str
    layer: int = -1

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"{self.name}[{self.layer}]"


IMAGE = Site("image")  # pictures and where they stand in the prompts, before anything is encoded
PROMPT = Site("prompt")  # the words of prompts
VIT_OUT = Site("vit.out")  # features of each image, before the connector
LLM_IN = Site("llm.in")  # the spliced sequence, before the first decoder layer
LOGITS = Site("logits")  # next-token logits of all streams
DECODE = Site("decode")  # the choice of the next token
KV_PREFILL = Site("kv.prefill")  # the caches of all layers, after the prompt
KV_DECODE = Site("kv.decode")  # a layer's cache, at every generated token


def vit_mid(block: int) -> Site:
    """Between attention and MLP of a block of the vision encoder."""
    return Site("vit.mid", block)


def vit_after(block: int) -> Site:
    """What leaves a block of the vision encoder."""
    return Site("vit.after", block)


def vit_resid(block: int) -> Site:
    """What the MLP of a block of the vision encoder adds."""
    return Site("vit.resid", block)


def llm_before(layer: int) -> Site:
    """The hidden states that enter decoder layer ``layer`` (after ``layer`` layers)."""
    return Site("llm.before", layer)


def attn(layer: int) -> Site:
    """The attention of decoder layer ``layer``."""
    return Site("attn", layer)


def heads(layer: int) -> Site:
    """What each attention head of decoder layer ``layer`` hands to the output projection."""
    return Site("heads", layer)


def resid(layer: int) -> Site:
    """What the MLP of decoder layer ``layer`` adds to the residual stream."""
    return Site("resid", layer)


Position = Literal["keep", "reindex"]


@dataclass(frozen=True)
class Text:
    """The text of each sample's prompt, for selectors inside the language model; ``after``: after the last image (in
    training up to the first row there that asks, see :func:`~vlm.models.program.signals.question`)."""

    x: Float[Tensor, "segments words width"]
    valid: Bool[Tensor, "segments words"]
    after: Bool[Tensor, "segments words"]
    signal: Callable[[Signal], Tensor]


@dataclass(frozen=True)
class Tokens:
    """What a selector sees: visual tokens in segments (an image in the encoder and after it, a sample in the LLM).

    total: tokens of each segment before any cut. images: images of each segment; image: which of them each token
    belongs to, numbered over the batch. row, col: its place in the image's grid. size: how many tokens it is the mean
    of, None before any merging. seed gives an integer that depends on the segment's pixels only, so that random choices
    do not depend on which other samples share the batch. signal gives a signal's values for these tokens (its key axis
    is this segment's tokens).
    """

    x: Float[Tensor, "segments tokens width"]
    valid: Bool[Tensor, "segments tokens"]
    seed: Callable[[], Int[Tensor, " segments"]]
    signal: Callable[[Signal], Tensor]
    total: Int[Tensor, " segments"]
    images: Int[Tensor, " segments"]
    image: Int[Tensor, "segments tokens"]
    row: Int[Tensor, "segments tokens"]
    col: Int[Tensor, "segments tokens"]
    size: Float[Tensor, "segments tokens"] | None = None
    text: Callable[[], Text] | None = None  # found when it is asked for

    @classmethod
    def of_images(
        cls,
        x: Float[Tensor, "segments tokens width"],
        valid: Bool[Tensor, "segments tokens"],
        seed: Int[Tensor, " segments"],
        signal: Callable[[Signal], Tensor],
        columns: int = 1,
    ) -> "Tokens":
        """Segments that are whole images, before any cut, in raster order of ``columns`` columns."""
        place, one = torch.arange(x.shape[1], device=x.device).expand(valid.shape), torch.ones_like(seed)
        image = torch.arange(len(x), device=x.device)[:, None].expand(valid.shape)
        return cls(x, valid, lambda: seed, signal, valid.sum(1), one, image, place // columns, place % columns)

    @property
    def text_tokens(self) -> Text:
        assert self.text is not None  # check() lets only selectors of the language model ask
        return self.text()


class Selector(NamedTuple):
    """How a cut chooses.

    choose: marks the tokens that stay, given how many each segment may keep; without gradient.
    needs: the signals it reads. reduce: what becomes of the others, from the features (with their gradient), the marks
    and the counts; nothing if not given. It may add tokens: ``choose`` then marks fewer.
    """

    choose: Callable[[Tokens, Int[Tensor, " segments"]], Bool[Tensor, "segments tokens"]]
    needs: tuple[Signal, ...] = ()
    reduce: Callable[[Tokens, Bool[Tensor, "segments tokens"], Int[Tensor, " segments"]], Reduced] | None = None


@dataclass(frozen=True)
class Select:
    """Op at ``vit.*``, ``llm.in`` and ``llm.before[k]``: keep some visual tokens, drop or merge the rest.

    keep: of the tokens there were before any cut of the program. position: ``"keep"`` leaves the kept tokens their
    position ids, ``"reindex"`` counts anew. exact: False when the selector itself decides how many tokens stay and
    ``keep`` is only where it ends. weigh: later blocks of the encoder add the log of a merged token's size to the
    logits of its key (proportional attention).
    """

    keep: Budget
    selector: Selector
    position: Position = "keep"
    exact: bool = True
    weigh: bool = False


@dataclass(frozen=True)
class Regroup:
    """Op at ``attn[l]``: reweigh groups of keys by ``rule`` in the rows after the last image token.

    ``groups(keys)`` gives each key its group, in each head where heads differ. It is asked for the prompt and for the
    first generated token; later ones are in the group of that one, and keys of the prompt stay in theirs. Cache and
    cost of other rows are untouched. everywhere: all rows instead, those of samples without an image among them.
    """

    groups: Callable[[Keys], Int[Tensor, "batch keys"] | Int[Tensor, "batch heads keys"]]
    rule: Rule
    needs: tuple[Signal, ...] = ()
    everywhere: bool = False


@dataclass(frozen=True)
class Rescore:
    """Op at ``attn[l]``: change the attention of the newest row: a prompt's last token, then each generated one.

    scores(scores, keys) is asked before the softmax, weights(weights, keys) after it; both see [batch, heads, keys] in
    single precision or more. A score of -inf hides a key and must stay. Only this row is computed over again, so the
    cost does not depend on the prompt's length; the cache stays as it is.
    """

    scores: Callable[[Float[Tensor, "batch heads keys"], Keys], Float[Tensor, "batch heads keys"]] | None = None
    weights: Callable[[Float[Tensor, "batch heads keys"], Keys], Float[Tensor, "batch heads keys"]] | None = None
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class Gate:
    """Op at ``heads[l]``: multiply the output of each head by ``gains(keys)``, in the rows that :class:`Rescore` means.

    Keys and values of later layers change with it, so gains are to stay the same throughout an answer.
    """

    gains: Callable[[Keys], Float[Tensor, "batch heads"]]
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class Edit:
    """Op at ``resid[l]``: ``change(x, keys)`` instead of x, what the layer's MLP adds, in every row of the samples that
    have an image."""

    change: Callable[[Float[Tensor, "batch rows width"], Keys], Float[Tensor, "batch rows width"]]
    needs: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class EditBlock:
    """Op at ``vit.resid[l]``: ``change(x)`` instead of x, what the block's MLP adds, at every token of every view."""

    change: Callable[[Float[Tensor, "views tokens width"]], Float[Tensor, "views tokens width"]]


class Now(NamedTuple):
    """What a logits stage sees: the next-token logits of the decode's streams, one row for each text that grows.

    main: of the main stream, as earlier stages left them. other(context): of another stream. inner(layers, normed):
    what the head makes of the main stream's state after so many decoder layers, with the final norm or without. step:
    tokens generated so far. layout: of the main stream's whole sequence, generated tokens included.
    """

    main: Float[Tensor, "rows vocab"]
    other: Callable[[Context], Float[Tensor, "rows vocab"]]
    inner: Callable[[int, bool], Float[Tensor, "rows vocab"]]
    step: int
    layout: Layout

    @property
    def words_after_image(self) -> Int[Tensor, " rows"]:
        """Text tokens of each row's prompt after its last image, all of them where there is none."""
        layout = self.layout
        after = torch.arange(layout.role.shape[1], device=layout.role.device) > layout.last(layout.visual)[:, None]
        return (layout.valid & after).sum(1) - self.step


@dataclass(frozen=True)
class Rewrite:
    """Op at ``logits``: the next-token logits from which the decoder chooses.

    logits(now) gives them. streams: the contexts besides the main one that it reads; inner: after how many decoder
    layers it reads the main stream (0: its embeddings).
    """

    logits: Callable[[Now], Float[Tensor, "rows vocab"]]
    streams: tuple[Context, ...] = ()
    inner: tuple[int, ...] = ()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return tuple(signal for stream in self.streams for signal in stream.needs)


@dataclass(frozen=True)
class Control:
    """Op at ``decode``: something that watches how one prompt is answered, scores continuations and may go back.

    begin(decode) makes the controller of one prompt, see :mod:`vlm.models.program.control`. needs: signals that it
    reads at generated tokens too; inner: after how many decoder layers it reads the state of the newest one. beams:
    whether it ranks the beams of a search, or watches one text.
    """

    begin: Callable[[Any], Any]
    needs: tuple[Signal, ...] = ()
    inner: tuple[int, ...] = ()
    beams: bool = True


class Answered(NamedTuple):
    """Answers to the prompts of a batch, and which of them stand: nobody else need be asked."""

    answers: list[list[int]]
    stands: Bool[Tensor, " batch"]


@dataclass(frozen=True)
class Cascade:
    """Op at ``decode``: somebody who is asked before the model, which then runs only where the answer does not stand.

    answer(inputs, max_new_tokens, stop) is asked once for each batch. pass_on(inputs, rows) is told the inputs that the
    model gets next, which are so many of those rows.
    """

    answer: Callable[[Any, int, int], Answered]
    pass_on: Callable[[Any, Int[Tensor, " left"]], None]


@dataclass(frozen=True)
class Tap:
    """Op at ``attn[l]``: read a signal and change nothing; ``receive(value, layout of the keys)`` at every pass."""

    signal: Received
    receive: Callable[[Float[Tensor, "batch keys"], Layout], None] = field(compare=False)


@dataclass(frozen=True)
class Prepare:
    """Op at ``image`` and ``prompt``: other prompts in the place of those that were given, row for row.

    change(model, inputs, stop) makes them once, before the first pass of a decode; ``stop`` is the token that ends an
    answer, -1 where nobody says. It may run the model under :func:`~vlm.models.program.observe.observe` (``observes``).
    All streams begin with what it makes, so that contrasts of two contexts stay those of one change. Several follow
    each other. Prompts only: a training pass is refused.
    """

    change: Callable[[Any, Any, int], Any]
    observes: bool = False


Inside = Regroup | Rescore | Gate | Edit  # ops that change what a decoder layer does with a sequence as it is
Op = Prepare | Select | Inside | EditBlock | Rewrite | Control | Cascade | Tap | Evict | EvictStep | ReadStep
Program = tuple[tuple[Site, Op], ...]


def cut(facts: Facts, site: Site, keep: Budget, selector: Selector, position: Position = "keep") -> Program:
    """The program of a pruner that cuts once; empty when it keeps everything.

    Raises ModelError for a budget that such a cut cannot meet.
    """
    return cuts(facts, [(site, selector)], keep, position)


def cuts(
    facts: Facts,
    at: Sequence[tuple[Site, Selector]],
    keep: Budget,
    position: Position = "keep",
    shares: Sequence[float] | None = None,
) -> Program:
    """The program of a pruner that cuts at several sites so that ``keep`` is met; empty when it keeps everything.

    shares: what stays after the cuts is proportional to these; without, each cut keeps the same share of what the one
    before left. Raises ModelError for a budget that these cuts cannot meet.
    """
    if keep.everything:
        return ()
    counts = budgets(keep, facts, [max(site.layer, 0) for site, _ in at], shares)
    pairs = zip(at, counts, strict=True)
    return tuple((site, Select(count, selector, position)) for (site, selector), count in pairs)


def needs_of(op: Op, layers: int) -> tuple[Signal, ...]:
    """The signals that an op asks for; ``layers`` of the decoder."""
    if isinstance(op, Select):
        return op.selector.needs
    if isinstance(op, Tap):
        return (op.signal,)
    if isinstance(op, EvictStep | Prepare | Cascade | EditBlock):
        return ()
    if isinstance(op, Inside | Rewrite | Control):
        return op.needs
    return tuple(signal for layer in range(layers) for signal in op.needs(layer))


_IN_LAYER = ("attn", "heads", "resid")


def in_encoder(site: Site) -> bool:
    return site.name in ("vit.mid", "vit.after")


def check(program: Program, facts: Facts) -> None:
    """Refuse a program that does not fit the model. Raises ModelError: site, expected, found."""
    for site, op in program:
        _check_site(site, facts)
        for what in (site.name, type(op).__name__, getattr(op, "position", "")):
            if what in facts.refuses:
                raise ModelError(f"{site}: {facts.refuses[what]}")
        for signal in needs_of(op, facts.layers):
            if (what := type(signal).__name__) in facts.refuses:
                raise ModelError(f"{site}: {facts.refuses[what]}")
            _check_signal(site, signal, facts)
        if isinstance(op, Rewrite | Control) and (wrong := [n for n in op.inner if not 0 <= n <= facts.layers]):
            raise ModelError(f"{site}: it reads the state after 0 to {facts.layers} layers; found {wrong[0]}")
    _check_together(program)
    _check_decode(program)


def _check_site(site: Site, facts: Facts) -> None:
    if site.name in ("llm.before", *_IN_LAYER):
        first = 1 if site.name == "llm.before" else 0
        if not first <= site.layer < facts.layers:
            raise ModelError(f"{site}: the language model has layers {first}..{facts.layers - 1}; found {site.layer}")
    if in_encoder(site) or site.name == "vit.resid":
        if facts.vision is None:
            raise ModelError(f"{site}: {facts.refuses.get('vit.out', 'this vision encoder is hidden from programs')}")
        if facts.vision.cuts and in_encoder(site):
            raise ModelError(f"{site}: tokens cannot go inside this vision encoder: {facts.vision.cuts}")
        facts.vision.block(site.layer, str(site))


def _check_together(program: Program) -> None:
    cuts = [site for site, op in program if isinstance(op, Select)]
    for site in cuts:
        if cuts.count(site) > 1:
            raise ModelError(f"{site}: two cuts at one site; found {', '.join(map(str, cuts))}")
    kinds = {type(op) for _, op in program}
    if EditBlock in kinds and any(in_encoder(site) for site in cuts):
        raise ModelError("vit.resid: its edits are of every token, and a pruner drops some inside the encoder")
    for site in {site for site, op in program if isinstance(op, Regroup | Rescore)}:
        found = [type(op).__name__ for at, op in program if at == site and isinstance(op, Regroup | Rescore)]
        if len(found) > 1:
            raise ModelError(
                f"{site}: {len(found)} methods change the attention weights of this layer, and each is defined on the "
                "model's own; use one of them, or give them different layers"
            )
    if kinds & {Evict, EvictStep, ReadStep} and kinds & {Regroup, Rescore, Tap}:
        raise ModelError(
            "kv: each head keeps entries of its own, so attention over groups of tokens cannot be reweighed; "
            "use a cache policy or an attention mitigator, not both"
        )
    for kind in (Evict, EvictStep, ReadStep):
        if sum(isinstance(op, kind) for _, op in program) > 1:
            raise ModelError(f"kv: two cache policies at once; found two of {kind.__name__}")


def _check_decode(program: Program) -> None:
    kinds = [type(op) for _, op in program]
    if kinds.count(Cascade) > 1:
        raise ModelError("decode: two models that are each asked first; use one of the two")
    if kinds.count(Control) > 1:
        raise ModelError("decode: two decode controllers at once, each of which would undo what the other chose")
    if Control in kinds and {Evict, EvictStep, ReadStep} & set(kinds):
        raise ModelError(
            "decode: a decode controller looks at the attention to every token and goes back, and a cache policy drops "
            "entries for good; use one of the two"
        )
    stages = [[c.name for c in op.streams if c.alters == "image"] for _, op in program if isinstance(op, Rewrite)]
    images = [" and ".join(names) for names in stages if names]
    if len(images) > 1:
        raise ModelError(
            f"logits: {images[0]} and {images[1]} both weigh the image by what its change does to the "
            "model's own logits, and after one stage those are no longer the model's own; use one of the two"
        )


def _check_signal(site: Site, signal: Signal, facts: Facts) -> None:
    """Refuse a signal that is not known yet at ``site``."""
    if signal.part == "vision":
        if not (in_encoder(site) or site.name == "vit.out"):
            raise ModelError(f"{site}: it asks for {signal}, which belongs to the vision encoder")
        assert facts.vision is not None or "vit.out" in facts.refuses
        if facts.vision is not None:
            facts.vision.block(signal.layer, str(site))
            if in_encoder(site) and signal.layer > site.layer:
                raise ModelError(f"{site}: it asks for {signal}, which is known only after that block")
        return
    if signal.of_inputs and not (in_encoder(site) or site == VIT_OUT):
        return
    if not 0 <= signal.layer < facts.layers:
        raise ModelError(f"{site}: it asks for {signal}, but layers are 0..{facts.layers - 1}")
    if site.name.startswith("kv.") or site in (LOGITS, DECODE):
        return
    if site.name in _IN_LAYER or signal.of_state or signal.ahead_of_layer:
        known = signal.layer <= site.layer
    else:
        known = signal.layer < site.layer
    if not known:
        raise ModelError(f"{site}: it asks for {signal}, which is known only after that layer")


class Method(Protocol):
    """A pruner, a mitigator or a cache policy: a frozen dataclass in a file of its own name; its fields are its recipe
    options.

    source: paper and section. verified: ``"golden"`` (official numbers), ``"code"``, ``"paper"`` or
    ``"reconstruction"``. A neutral setting compiles to the empty program.
    """

    source: ClassVar[str]
    verified: ClassVar[str]

    def program(self, facts: Facts) -> Program: ...
