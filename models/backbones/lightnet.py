"""LightNet: attention that is a sum over all tokens, taken once and in any order of rows and columns."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.kernels.linear import linear_attention
from vlm.models.backbone import BackboneEncoder, init_linear
from vlm.models.errors import ModelError


class AxialDecay(nn.Module):
    """MD-TPE: what each token takes over from those above it, and from those to its left, decaying with distance.

    For each axis: a sum over the tokens up to its own, weighted by ``decay ** distance`` (a decay per head) and by two
    learned vectors per channel; normalised, projected, and added up over the axes.
    """

    def __init__(self, dim: int, heads: int, axes: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.decay = nn.Parameter(torch.randn(axes, heads))
        self.q, self.k = nn.Parameter(torch.randn(axes, dim)), nn.Parameter(torch.randn(axes, dim))
        self.norm = nn.ModuleList(nn.RMSNorm(dim) for _ in range(axes))
        self.proj = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(axes))

    def forward(self, x: Float[Tensor, "n *axes dim"]) -> Float[Tensor, "n *axes dim"]:
        total = torch.zeros_like(x)
        for axis, (norm, proj) in enumerate(zip(self.norm, self.proj, strict=True)):
            line = x.movedim(axis + 1, -2)  # [N,...,L,C]
            distance = _distances(line.shape[-2], x.device)
            weight = (F.logsigmoid(self.decay[axis])[:, None, None] * distance).exp() * (distance >= 0)  # [H,L,L]
            parts = line.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [N,...,H,L,d]
            summed = (weight.to(x.dtype) @ parts).transpose(-2, -3).flatten(-2) * (self.q[axis] * self.k[axis])
            total = total + proj(norm(summed)).movedim(-2, axis + 1)
        return total


def _distances(length: int, device: torch.device) -> Int[Tensor, "length length"]:
    """How far back of token t token s lies, negative where it comes after."""
    place = torch.arange(length, device=device)
    return place[:, None] - place


def turned(
    x: Float[Tensor, "n heads length dim"], places: Int[Tensor, "length axes"], base: float = 10000.0
) -> Float[Tensor, "n heads length double"]:
    """MD-LRPE: twice the channels, so that products of two tokens have a factor cos(angle of their distance).

    Channels are shared among the axes, each with frequencies of its own.
    """
    share = -(-x.shape[3] // places.shape[1])
    channel = torch.arange(x.shape[3], device=x.device)
    frequency = base ** -((channel % share) / share)
    angle = places[:, channel // share].to(x.dtype) * frequency.to(x.dtype)  # [L,d]
    return torch.cat([x * angle.cos(), x * angle.sin()], 3)


class LightNetMixer(nn.Module):
    """Additive linear attention: each channel of the keys is divided among the tokens by a softmax over them.

    Without order every token reads the same sum over all of them. ``causal``: a token reads the sum over those up to
    its own, each channel normalised over just these; the last token then reads what the form without order reads.
    extra_zero: one more logit of 0 in every softmax, as in the author's later library.
    """

    def __init__(self, dim: int, heads: int, causal: bool = False, extra_zero: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ModelError(f"model.vision: lightnet: expected heads that divide the width {dim}; found {heads}")
        self.heads, self.causal, self.extra_zero = heads, causal, extra_zero
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = nn.Sequential(nn.Linear(dim, dim // heads, bias=False), nn.Linear(dim // heads, dim, bias=False))
        self.norm = nn.RMSNorm(dim // heads)

    def forward(
        self, x: Float[Tensor, "n tokens dim"], places: Int[Tensor, "tokens axes"] | None = None
    ) -> Float[Tensor, "n tokens dim"]:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # [N,H,T,d]
        out = self.mix(F.silu(q), k, v, places)
        out = self.norm(out).transpose(1, 2).flatten(2)
        return self.o_proj(out * self.gate(x).sigmoid())

    def mix(
        self,
        q: Float[Tensor, "n heads tokens dim"],
        k: Float[Tensor, "n heads tokens dim"],
        v: Float[Tensor, "n heads tokens dim"],
        places: Int[Tensor, "tokens axes"] | None = None,
    ) -> Float[Tensor, "n heads tokens dim"]:
        """The attention itself; ``k`` are logits over the tokens."""
        with_zero = F.pad(k, (0, 0, 1, 0)) if self.extra_zero else k
        if not self.causal:
            share = with_zero.softmax(2)[:, :, -k.shape[2] :]
            if places is not None:
                q, share = turned(q, places), turned(share, places)
            return _summed(q, share, v, causal=False)
        total = with_zero.logcumsumexp(2)  # what the sum up to each token is
        before = F.pad(total, (0, 0, 1, 0))[:, :, : total.shape[2]]
        own, earlier = total[:, :, -k.shape[2] :], before[:, :, -k.shape[2] :]
        decay = earlier - own
        if not self.extra_zero:
            decay = torch.cat([torch.zeros_like(decay[:, :, :1]), decay[:, :, 1:]], 2)  # there is nothing to decay yet
        share = (k - own).exp()
        if places is not None:
            q, share, decay = turned(q, places), turned(share, places), torch.cat([decay, decay], 3)
        return _summed(q, share, v, log_decay=decay.clamp_max(0.0))


def _summed(q: Tensor, share: Tensor, v: Tensor, **how: Any) -> Tensor:
    out = linear_attention(q, share, v, scale=1.0, **how)
    assert isinstance(out, Tensor)  # a state comes with it only if asked for
    return out


class _Glu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, extra_zero: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.mixer = LightNetMixer(dim, heads, extra_zero=extra_zero)
        self.mlp = _Glu(dim, 8 * dim // 3)

    def forward(
        self, x: Float[Tensor, "n tokens dim"], places: Int[Tensor, "tokens axes"] | None
    ) -> Float[Tensor, "n tokens dim"]:
        x = x + self.mixer(self.norm1(x), places)
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """position: ``tpe`` (at the input), ``lrpe`` (in every block), ``both`` or ``none``."""

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int = 12,
        patch: int = 16,
        classes: int = 1000,
        position: Literal["tpe", "lrpe", "both", "none"] = "both",
        extra_zero: bool = False,
    ) -> None:
        super().__init__()
        if position not in ("tpe", "lrpe", "both", "none"):
            raise ModelError(f"model.vision.config: lightnet: position is tpe, lrpe, both or none; found {position!r}")
        self.stages, self.turns = depth, position in ("lrpe", "both")
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.position = AxialDecay(dim, heads) if position in ("tpe", "both") else None
        self.blocks = nn.ModuleList(Block(dim, heads, extra_zero) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.apply(init_linear)

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim rows cols"]]:
        x = self.patch_embed(images).permute(0, 2, 3, 1)  # [N,h,w,C]
        rows, cols = x.shape[1:3]
        x = (x if self.position is None else x + self.position(x)).flatten(1, 2)
        axes = [torch.arange(size, device=x.device) for size in (rows, cols)]
        places = torch.cartesian_prod(*axes) if self.turns else None
        for number, block in enumerate(self.blocks):
            x = block(x, places)
            out = self.norm(x) if number == self.stages - 1 else x
            yield out.transpose(1, 2).unflatten(2, (rows, cols))

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.maps(images)
        return self.head(last.mean((2, 3)))


class Lightnet(BackboneEncoder):
    """Linear attention without order whose keys are a softmax over all tokens, in a ViT's layout.

    Neither code nor weights of the vision model are published. Attention, gates and positions follow the authors' text
    model and library; sizes are those of ViT-T, -S and -B, within 3 % of the parameters that the paper names.
    """

    source: ClassVar[str] = "LightNet (2024), sections 3 and 4.3; structure from the authors' text model"
    verified: ClassVar[str] = "reconstructed; nothing published to compare with"

    network = Network
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"dim": 192, "heads": 3},
        "small": {"dim": 384, "heads": 6},
        "base": {"dim": 768, "heads": 12},
    }
    smallest = 16
    multiple = 16
    blind = "its attention is a sum over tokens without rows"
    cuts = "its positions are of whole rows and columns"
