"""A program inside a vision encoder: what its blocks are made to show and to drop.

Blocks are modules of timm, Transformers or OpenCLIP, used as they are. A hook around a block enters a function mode
that sees the block's call of ``scaled_dot_product_attention`` (OpenCLIP: ``multi_head_attention_forward``), so queries,
keys and values are the library's own, after its norms, and attention needs no eager version. Cuts drop tokens from what
leaves a block, or, between attention and MLP, from what enters its MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vlm.models.encoder import Encoder
from vlm.models.errors import ModelError
from vlm.models.program.program import VIT_OUT, Position, Program, Select, Tokens, in_encoder, needs_of
from vlm.models.program.reduce import Reduced
from vlm.models.program.segments import places, rows_at
from vlm.models.program.signals import Attention, Signal

# Where a block's second half begins, and what it consists of: timm, Transformers' CLIP and SigLIP.
_HALVES = (("attn", "norm2"), ("self_attn", "layer_norm2"))


class Cut(NamedTuple):
    """What a cut in one place made of the patches: a replay of it needs no choice."""

    kept: Bool[Tensor, "images patches"]
    wanted: Int[Tensor, " images"]


class Encoding:
    """What is known of one pass through the encoder: the patches that are left, and the signals read so far.

    place: raster number of each patch, valid: which are real, size: how many patches each is the mean of. total:
    patches of an image before any cut.
    """

    def __init__(self, images: int, patches: int, columns: int, seed: Int[Tensor, " images"]) -> None:
        device = seed.device
        self.seed, self.columns = seed, columns
        self.total = torch.full((images,), patches, device=device)
        self.place = torch.arange(patches, device=device).expand(images, patches)
        self.valid = torch.ones_like(self.place, dtype=torch.bool)
        self.size: Float[Tensor, "images patches"] | None = None
        self.weigh = False
        self.cut_at: dict[str, Cut | None] = {}
        self.signals: dict[Signal, Tensor] = {}

    @property
    def cut(self) -> bool:
        return self.place.shape[1] != int(self.total[0]) or not bool(self.valid.all())

    def tokens(self, x: Float[Tensor, "images patches width"]) -> Tokens:
        return Tokens(
            x,
            self.valid,
            self.seed,
            self.signals.__getitem__,
            self.total,
            torch.ones_like(self.total),
            torch.arange(len(self.total), device=x.device)[:, None].expand(self.place.shape),
            self.place // self.columns,
            self.place % self.columns,
            self.size,
        )

    def take(self, reduced: Reduced) -> None:
        """Only these patches are left; signals come along."""
        at, index = reduced.place, reduced.place
        self.signals = {s: _gather(value, index, s.key_axis) for s, value in self.signals.items()}
        size = self.size if self.size is not None else torch.ones_like(self.place, dtype=torch.float32)
        self.size = reduced.size if reduced.size is not None else size.gather(1, at)
        self.place, self.valid = self.place.gather(1, at), reduced.valid


class VisionEngine:
    """The encoder's part of a program, lowered onto its blocks. Made by ``attach``."""

    def __init__(self, encoder: Encoder, program: Program, layers: int, impl: str) -> None:
        self.encoder, self.impl = encoder, impl
        self.cuts = {str(site): op for site, op in program if isinstance(op, Select) and in_encoder(site)}
        self.out = next((op for site, op in program if site == VIT_OUT and isinstance(op, Select)), None)
        needs = {s for _, op in program for s in needs_of(op, layers) if s.part == "vision"}
        self.needs = {layer: [s for s in needs if s.layer == layer] for layer in {s.layer for s in needs}}
        self.now: Encoding | None = None

    @property
    def position(self) -> Position:
        """What becomes of position ids: the wish of the last cut."""
        ops = [*self.cuts.values(), *([self.out] if self.out else [])]
        return ops[-1].position if ops else "keep"

    @property
    def acts(self) -> bool:
        return bool(self.cuts or self.out)

    def hook(self) -> list[RemovableHandle]:
        """Hooks on every block that must be watched or cut."""
        handles = []
        for number, block in enumerate(self.encoder.blocks):
            if self.cuts or number in self.needs:
                watch = _Around(self, number)
                handles.append(block.register_forward_pre_hook(watch.enter))
                handles.append(block.register_forward_hook(watch.leave, always_call=True))
        return handles

    def begin(self, images: int, seed: Int[Tensor, " images"]) -> None:
        rows, columns = self.encoder.grid
        self.now = Encoding(images, rows * columns, columns, seed)

    def finish(self, features: Float[Tensor, "images patches width"]) -> Reduced | None:
        """The features that go to the connector, or None when all do as they are. Makes the cut at ``vit.out``."""
        now = self.now
        assert now is not None
        reduced = None
        if self.out is not None and (choice := self._choose("vit.out", self.out, now, features)) is not None:
            reduced = _reduce(self.out, now.tokens(features), choice)
            now.take(reduced)
        self.now = None if not self.cuts else now  # a recomputed block needs what its cut was
        if reduced is not None:
            return reduced._replace(place=now.place)
        return Reduced(now.place, features, now.valid) if now.cut else None

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        """Enter the signals of a block from its attention call."""
        now = self.now
        if now is None or not self.needs.get(layer):
            return
        valid = self._with_prefix(now.valid)
        common: Any = {"causal": False, "scale": scale, "validate": False}
        common["key_valid"] = None if bool(valid.all()) else valid
        seen = Attention(q, k, v, valid, common, self.impl, prefix=self.encoder.prefix)
        with torch.no_grad():
            for signal in self.needs[layer]:
                now.signals[signal] = signal.read(seen).detach()

    def bias(self, like: Tensor) -> Float[Tensor, "images 1 1 tokens"] | None:
        """What is added to the logits of each key: padding hidden, merged tokens weighed; None: nothing."""
        now = self.now
        if now is None or not now.cut:
            return None
        valid = self._with_prefix(now.valid)
        bias = torch.zeros(valid.shape, dtype=like.dtype, device=like.device).masked_fill(~valid, -torch.inf)
        if now.weigh and now.size is not None:
            ones = now.size.new_ones(len(now.size), self.encoder.prefix)
            bias = bias + torch.cat([ones, now.size.clamp_min(1)], 1).log().to(like.dtype)
        return bias[:, None, None] if bool((bias != 0).any()) else None

    def reduce(self, site: str, x: Float[Tensor, "images tokens width"]) -> Float[Tensor, "images fewer width"]:
        """Make the cut at ``site`` of a tensor with prefix tokens."""
        op, now, prefix = self.cuts.get(site), self.now, self.encoder.prefix
        if op is None or now is None:
            return x
        choice = self._choose(site, op, now, x[:, prefix:])
        if choice is None:
            return x
        tokens = now.tokens(x[:, prefix:])
        reduced = _reduce(op, tokens, choice)
        now.weigh = now.weigh or op.weigh
        now.take(reduced)
        return torch.cat([x[:, :prefix], reduced.features.to(x.dtype)], 1)

    def _choose(self, site: str, op: Select, now: Encoding, x: Tensor) -> Cut | None:
        """Choose once; None when all stay, so that a full budget changes nothing, to the bit."""
        if site not in now.cut_at:
            now.cut_at[site] = None
            count = op.keep.count(now.total, torch.ones_like(now.total)).minimum(now.valid.sum(1))
            if not (op.exact and bool((count >= now.valid.sum(1)).all())):
                with torch.no_grad():
                    kept = op.selector.choose(now.tokens(x.detach()), count)
                if op.selector.reduce is not None or not bool((kept | ~now.valid).all()):
                    now.cut_at[site] = Cut(kept, count)
        return now.cut_at[site]

    def _with_prefix(self, valid: Bool[Tensor, "images patches"]) -> Bool[Tensor, "images tokens"]:
        return F.pad(valid, (self.encoder.prefix, 0), value=True)


class _Around:
    """Hooks around one block: a mode that sees its attention, a cut of what leaves it or enters its MLP."""

    def __init__(self, engine: VisionEngine, number: int) -> None:
        self.engine, self.number = engine, number
        self.modes: list[_Watch] = []

    def enter(self, block: nn.Module, args: tuple) -> tuple | None:
        mode = _Watch(lambda *call: self.engine.read(self.number, *call), self.engine.bias)
        mode.__enter__()
        self.modes.append(mode)
        site = f"vit.mid[{self.number}]"
        if site not in self.engine.cuts or self.engine.now is None:
            return None
        return (self._first_half(site, block, args[0]), *args[1:])

    def leave(self, block: nn.Module, args: tuple, output: Any) -> Any:
        if not self.modes:
            return None
        self.modes.pop().__exit__(None, None, None)
        if f"vit.mid[{self.number}]" in self.engine.cuts:
            vars(_halves(block)[0]).pop("forward", None)
        if output is None:
            return None  # the block raised
        hidden = output[0] if isinstance(output, tuple) else output
        cut = self.engine.reduce(f"vit.after[{self.number}]", hidden)
        if cut is hidden:
            return None
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    def _first_half(self, site: str, block: nn.Module, x: Tensor) -> Tensor:
        """Run the block up to its MLP, cut there, and leave it the MLP alone to do: its attention gives zeros."""
        attention, norm = _halves(block)
        caught: list[Tensor] = []

        def stop(module: nn.Module, args: tuple) -> None:
            caught.append(args[0])
            raise _HalfWay

        handle = norm.register_forward_pre_hook(stop)
        try:
            block.forward(x)
        except _HalfWay:
            pass
        finally:
            handle.remove()
        returns_pair = type(attention).__module__.startswith("transformers.")
        zeros: Callable[..., Any] = lambda hidden, *args, **kwargs: (  # noqa: E731
            (torch.zeros_like(hidden), None) if returns_pair else torch.zeros_like(hidden)
        )
        vars(attention)["forward"] = zeros  # of this instance, until the block is left
        return self.engine.reduce(site, caught[0])


class _HalfWay(Exception):
    """Raised to leave a block at its MLP."""


def _halves(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A block's attention and the norm before its MLP. Raises ModelError for a block that is built otherwise."""
    for attention, norm in _HALVES:
        if hasattr(block, attention) and hasattr(block, norm):
            return getattr(block, attention), getattr(block, norm)
    raise ModelError(f"vit.mid: expected a block with attention, a norm and an MLP; found {type(block).__name__}")


class _Watch(TorchFunctionMode):
    """Shows attention calls to ``see(q, k, v, scale)`` and adds ``bias(q)`` to the logits of their keys."""

    def __init__(self, see: Callable[..., None], bias: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.see, self.bias = see, bias

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs |= dict(zip(names, args, strict=False))
            self.see(kwargs["query"], kwargs["key"], kwargs["value"], kwargs.get("scale"))
            bias = self.bias(kwargs["query"])
            if bias is not None:
                kwargs["attn_mask"] = bias if kwargs.get("attn_mask") is None else kwargs["attn_mask"] + bias
            return func(**kwargs)
        if func is F.multi_head_attention_forward:
            self.see(*_projected(*args[:7]), None)
            bias = self.bias(args[0])
            if bias is not None:
                heads, length = args[4], args[0].shape[0]
                wide = bias.expand(-1, heads, length, -1).flatten(0, 1)
                kwargs["attn_mask"] = wide if kwargs.get("attn_mask") is None else kwargs["attn_mask"] + wide
        return func(*args, **kwargs)


def _projected(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, tokens, dim] of a call of ``multi_head_attention_forward``."""
    biases = bias.chunk(3) if bias is not None else (None, None, None)
    parts = []
    for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True):
        projected = F.linear(x, w, b)  # [T,B,C]
        parts.append(projected.unflatten(2, (heads, -1)).permute(1, 2, 0, 3))
    return parts[0], parts[1], parts[2]


def _reduce(op: Select, tokens: Tokens, choice: Cut) -> Reduced:
    """The tokens that go on; places are numbers among ``tokens``."""
    if op.selector.reduce is not None:
        return op.selector.reduce(tokens, choice.kept, choice.wanted)
    place, valid = places(choice.kept & tokens.valid)
    return Reduced(place, rows_at(tokens.x, place), valid)


def _gather(value: Tensor, index: Int[Tensor, "images kept"], axis: int) -> Tensor:
    shape = [1] * value.ndim
    shape[0], shape[axis] = index.shape
    wide = [*value.shape]
    wide[axis] = index.shape[1]
    return value.gather(axis, index.reshape(shape).expand(wide))
