"""VWFormer's segmentation head: varying-window attention over a pyramid: ``{use: vwformer}``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder
from vlm.models.errors import ModelError

WINDOWS = 8  # windows per side of the stride-8 map


@dataclass(frozen=True)
class Vwformer:
    """A class for every pixel, from queries of a window that look at contexts of two, four and eight windows' side.

    width: channels inside. dropout: of whole channels before the last layer, while training.

    The encoder must be one of our own backbones, whole (``layer: -1``), with maps of strides 4, 8, 16 and 32.
    """

    source: ClassVar[str] = "VWFormer (ICLR 2024), sections 3 and 4; official code"
    verified: ClassVar[str] = "golden"
    per_pixel: ClassVar[bool] = True

    width: int = 512
    dropout: float = 0.1

    def build(self, encoder: Any, classes: int) -> nn.Module:
        return VaryingWindowHead(pyramid_widths(encoder), classes, self.width, dropout=self.dropout)


def pyramid_widths(encoder: Any) -> list[int]:
    """Channels of the four maps. Raises ModelError for an encoder that has others, or not all of them."""
    expected = "head vwformer: expected an encoder of ours, whole (layer: -1), with maps of strides 4, 8, 16 and 32"
    if not isinstance(encoder, BackboneEncoder) or encoder.output < encoder.depth - 1:
        raise ModelError(f"{expected}; found {type(encoder).__name__}")
    side = encoder.image.size
    weights = {name: torch.empty_like(p, device="meta") for name, p in encoder.named_parameters()}
    weights |= {name: torch.empty_like(b, device="meta") for name, b in encoder.named_buffers()}
    maps = functional_call(_Maps(encoder), {f"encoder.{k}": v for k, v in weights.items()}, _blank(side))
    strides = [side / one.shape[2] if isinstance(one, Tensor) else 0 for one in maps]
    if strides != [4, 8, 16, 32]:
        found = ", ".join(f"{stride:g}" for stride in strides)
        raise ModelError(f"{expected}; found {type(encoder).__name__} of strides {found}")
    return [one.shape[1] for one in maps]


def _blank(side: int) -> Tensor:
    return torch.empty(2, 3, side, side, device="meta")


class _Maps(nn.Module):
    """An encoder's maps as what a module returns."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        return list(self.encoder.model.maps(images))


def _conv_bn(inward: int, outward: int, side: int = 1, relu: bool = True) -> nn.Sequential:
    layers = {"conv": nn.Conv2d(inward, outward, side, bias=False), "bn": nn.BatchNorm2d(outward)}
    block = nn.Sequential()
    for name, layer in layers.items():
        block.add_module(name, layer)
    if relu:
        block.add_module("activate", nn.ReLU())
    return block


class _Project(nn.Module):
    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inward, outward)

    def forward(self, x: Float[Tensor, "n inward h w"]) -> Float[Tensor, "n outward h w"]:
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _WithBias(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "n dim h w"]) -> Float[Tensor, "n dim h w"]:
        return self.conv(x)


class WindowAttention(nn.Module):
    """Embedded-Gaussian attention of a window's pixels over its context, one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g, self.theta, self.phi = _WithBias(dim), _WithBias(dim), _WithBias(dim)
        self.conv_out = _conv_bn(dim, dim, relu=False)
        nn.init.normal_(self.theta.conv.weight, std=0.01)
        nn.init.zeros_(self.conv_out.bn.weight)  # type: ignore[arg-type]

    def forward(
        self, query: Float[Tensor, "windows dim h w"], context: Float[Tensor, "windows dim h w"]
    ) -> Float[Tensor, "windows dim h w"]:
        q, k, v = (layer(x).flatten(2).transpose(1, 2) for layer, x in (
            (self.theta, query), (self.phi, context), (self.g, context)
        ))  # fmt: skip  # [n,h w,dim]
        out = F.scaled_dot_product_attention(q, k, v)  # scale dim ** -0.5
        return self.conv_out(out.transpose(1, 2).reshape(query.shape))


def windows(x: Float[Tensor, "n dim h w"], side: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """Windows of ``side`` every ``step`` pixels, sample by sample, [n * windows, dim, *side]."""
    cut = x.unfold(2, side[0], step[0])[:, :, :WINDOWS].unfold(3, side[1], step[1])[:, :, :, :WINDOWS]
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def join(x: Float[Tensor, "windows dim h w"], count: int) -> Float[Tensor, "n dim height width"]:
    """Undo :func:`windows` of ``count`` samples where windows do not overlap."""
    grid = x.unflatten(0, (count, WINDOWS, WINDOWS))  # [n,8,8,dim,h,w]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def copy_shift(x: Float[Tensor, "n dim h w"], ratio: int) -> Tensor:
    """Padding so that every window has a whole context: strips from inside the map, next to what they pad.

    Context windows of the border then hold real pixels: those that the nearest whole context would.
    """
    for axis in (3, 2):
        size = x.shape[axis]
        step = size // WINDOWS
        near, far = (ratio + 1) * step // 2, ratio * step
        left, right = x.narrow(axis, near, far - near), x.narrow(axis, size - far, far - near)
        x = torch.cat([left, x, right], axis)
    return x


class VaryingWindowHead(nn.Module):
    """Four maps of strides 4, 8, 16, 32 to class logits at stride 4; keys as the official head's.

    The map of stride 8 must be a multiple of 8 in both directions (images of multiples of 64).
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        dim: int = 512,
        ratios: Sequence[int] = (2, 4, 8),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.ratios = tuple(ratios)
        self.linear_c1 = _Project(widths[0], 48)
        self.linear_c2, self.linear_c3, self.linear_c4 = (_Project(width, dim) for width in widths[1:])
        self.linear_fuse = _conv_bn(3 * dim, dim)
        self.ds = nn.ModuleList(_conv_bn(dim, dim // r**2, r) for r in self.ratios)
        self.attn = nn.ModuleList(WindowAttention(dim) for _ in self.ratios)
        self.short_path = _conv_bn(dim, dim)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), _conv_bn(dim, dim))
        self.cat = _conv_bn((2 + len(self.ratios)) * dim, dim)
        self.low_level_fuse = _conv_bn(dim + 48, dim)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(dim, classes, 1)

    def forward(self, encoder: Any, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes height width"]:
        return self.decode(list(encoder.model.maps(images)))

    def decode(self, maps: Sequence[Float[Tensor, "n _ _ _"]]) -> Float[Tensor, "n classes h w"]:
        fused = self.fuse(maps)
        seen = [self.look(fused, number) for number in range(len(self.ratios))]
        whole = self.image_pool(fused).expand_as(fused)
        out = self.cat(torch.cat([self.short_path(fused), whole, *seen], 1))
        fine = self.linear_c1(maps[0])
        out = self.low_level_fuse(torch.cat([_resize(out, fine), fine], 1))
        return self.conv_seg(self.dropout(out))

    def fuse(self, maps: Sequence[Float[Tensor, "n _ _ _"]]) -> Float[Tensor, "n dim h w"]:
        """The three coarser maps at the size of the finest of them. Raises ModelError for a size without windows."""
        first = self.linear_c2(maps[1])
        if first.shape[2] % WINDOWS or first.shape[3] % WINDOWS:
            found = f"{first.shape[2]} x {first.shape[3]}"
            raise ModelError(f"head vwformer: expected a stride-8 map of multiples of {WINDOWS}; found {found}")
        coarse = [_resize(layer(x), first) for layer, x in ((self.linear_c4, maps[3]), (self.linear_c3, maps[2]))]
        return self.linear_fuse(torch.cat([*coarse, first], 1))

    def look(self, fused: Float[Tensor, "n dim h w"], number: int) -> Float[Tensor, "n dim h w"]:
        """Every window reads its context, ``ratio`` times its side, at the cost of a window of its own size."""
        ratio = self.ratios[number]
        step = fused.shape[2] // WINDOWS, fused.shape[3] // WINDOWS
        less, more = max(ratio // 2 - 1, 0), ratio // 2
        small = self.ds[number](F.pad(fused, (less, more, less, more)))  # [n,dim/r^2,h,w]
        context = windows(copy_shift(small, ratio), (ratio * step[0], ratio * step[1]), step)
        # space to depth: row offset, column offset, channel
        context = context.unflatten(3, (step[1], ratio)).unflatten(2, (step[0], ratio))  # [m,c,h,r,w,r]
        context = context.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return join(self.attn[number](windows(fused, step, step), context), len(fused)) + fused


def _resize(x: Float[Tensor, "n dim h w"], like: Float[Tensor, "n other h2 w2"]) -> Float[Tensor, "n dim h2 w2"]:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
