"""Neighborhood attention transformers, NAT, DiNAT and their kin: ``vision: {use: nat, variant: dinat_tiny}``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.kernels.neighborhood import neighborhood_attention
from vlm.models.backbone import BackboneEncoder, init_linear, relative_offsets


class NeighborhoodAttention(nn.Module):
    """Every place of a map attends to the window of ``kernel`` x ``kernel`` places around it, ``dilation`` apart.

    Windows at the border are moved inside. A map smaller than kernel * dilation is filled up with zeros on the right
    and below, before the projection, so that what fills it up has keys too (as the published networks do).
    """

    def __init__(self, dim: int, heads: int, kernel: int = 7, dilation: int = 1) -> None:
        super().__init__()
        self.heads, self.kernel, self.dilation = heads, kernel, dilation
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Float[Tensor, "images rows cols dim"]) -> Float[Tensor, "images rows cols dim"]:
        rows, cols = x.shape[1:3]
        least = self.kernel * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, least - cols), 0, max(0, least - rows)))
        shape = x.shape[1], x.shape[2]
        q, k, v = self.qkv(x).view(len(x), shape[0] * shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B,H,N,D]
        out = neighborhood_attention(q, k, v, shape, self.kernel, bias=self.rpb, dilation=self.dilation)
        return self.proj(out.transpose(1, 2).reshape(x.shape)[:, :rows, :cols])


class GlobalAttention(nn.Module):
    """All places attend to all, with a table of biases by offset: the baseline of the NAT paper.

    The table has the offsets of the grid it was made for; on another grid it is resized.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * side - 1, 2 * side - 1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("relative_position_index", relative_offsets(side, side))
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Float[Tensor, "images rows cols dim"]) -> Float[Tensor, "images rows cols dim"]:
        rows, cols = x.shape[1:3]
        q, k, v = self.qkv(x).view(len(x), rows * cols, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B,H,N,D]
        table, index = self.rpb, self.relative_position_index
        if (rows, cols) != (self.side, self.side):
            size = (2 * rows - 1, 2 * cols - 1)
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
            index = relative_offsets(rows, cols).to(x.device)
        bias = table.flatten(1)[:, index.flatten()].view(1, self.heads, *index.shape)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention and MLP, each with its residual, on maps with channels last; ``scale`` weighs their outputs."""

    def __init__(self, dim: int, attention: nn.Module, ratio: float, drop: float, scale: float | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attention, Mlp(dim, int(dim * ratio))
        self.drop_path = DropPath(drop)
        self.scaled = scale is not None
        if scale is not None:
            self.gamma1 = nn.Parameter(scale * torch.ones(dim))
            self.gamma2 = nn.Parameter(scale * torch.ones(dim))

    def forward(self, x: Float[Tensor, "images rows cols dim"]) -> Float[Tensor, "images rows cols dim"]:
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(self.gamma1 * attended if self.scaled else attended)
        changed = self.mlp(self.norm2(x))
        return x + self.drop_path(self.gamma2 * changed if self.scaled else changed)


class ConvTokenizer(nn.Module):
    """Stride 4 by two overlapping convolutions with nothing between them; channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        halve: Any = {"kernel_size": 3, "stride": 2, "padding": 1}
        self.proj = nn.Sequential(nn.Conv2d(3, dim // 2, **halve), nn.Conv2d(dim // 2, dim, **halve))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchTokenizer(nn.Module):
    """One linear map per patch; channels last. What is left over on the right and below is filled up with zeros."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj, self.norm = nn.Conv2d(3, dim, patch, patch), nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        images = F.pad(images, (0, -images.shape[3] % self.patch, 0, -images.shape[2] % self.patch))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """An overlapping convolution that halves the sides and doubles the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Float[Tensor, "images rows cols dim"]) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Squares of 2 x 2 places side by side and a linear map, as in Swin; an odd side is filled up with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "images rows cols dim"]) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, 3)))


class Stage(nn.Module):
    """Blocks of one width, then the way to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class NatNet(nn.Module):
    """All of the family.

    Args:
        embed: width of the first stage, doubled by each one after it. depths, heads: of the stages.
        ratio: width of the MLP's hidden layer over that of the block.
        kernel: side of the window; None for global attention (isotropic only).
        dilations: of the blocks of each stage, repeated along it; 1 everywhere if not given.
        scale: start of the layer scale; None for none.
        layout: ``"nat"`` overlapping convolutions, ``"swin"`` patches and their merging, ``"flat"`` patches of 16 x 16
            and one stage.
        side: rows of the grid that the bias tables of global attention are for.
        drop_path: rate of stochastic depth of the last block, growing from 0.
        classes: of the head.
    """

    def __init__(
        self,
        embed: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        heads: Sequence[int] = (2, 4, 8, 16),
        ratio: float = 3,
        kernel: int | None = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        scale: float | None = None,
        layout: str = "nat",
        side: int = 14,
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.flat = layout == "flat"
        self.patch_embed = (
            ConvTokenizer(embed) if layout == "nat" else PatchTokenizer(embed, patch=16 if self.flat else 4)
        )
        drop = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        stages = []
        for number, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            dim, steps = embed * 2**number, (dilations or [[1]] * len(depths))[number]
            blocks = []
            for j in range(depth):
                attention = (
                    GlobalAttention(dim, count, side)
                    if kernel is None
                    else NeighborhoodAttention(dim, count, kernel, steps[j % len(steps)])
                )
                blocks.append(Block(dim, attention, ratio, drop.pop(0), scale))
            merge = PatchMerging if layout == "swin" else ConvDownsampler
            stages.append(Stage(blocks, None if number == len(depths) - 1 else merge(dim)))
        if self.flat:
            self.layers = nn.ModuleList(stages[0].blocks)
        elif layout == "swin":
            self.layers = nn.ModuleList(stages)
        else:
            self.levels = nn.ModuleList(stages)
        width = embed * 2 ** (len(depths) - 1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.stages: int = depths[0] if self.flat else len(depths)
        self.apply(init_linear)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Of the isotropic networks."""
        return list(self.layers)

    def maps(self, images: Float[Tensor, "images 3 height width"]) -> Iterator[Float[Tensor, "images width rows cols"]]:
        x = self.patch_embed(images)  # [N,h,w,V]
        steps: Any = self.layers if hasattr(self, "layers") else self.levels
        for number, step in enumerate(steps):
            for block in [step] if self.flat else step.blocks:
                x = block(x)
            last = number == self.stages - 1
            yield (self.norm(x) if last else x).permute(0, 3, 1, 2)
            if not self.flat and not last:
                x = step.downsample(x)

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        *_, last = self.maps(images)
        return self.head(last.mean((2, 3)))


_NAT: dict[str, dict[str, Any]] = {
    "mini": {},
    "tiny": {"depths": (3, 4, 18, 5)},
    "small": {"embed": 96, "depths": (3, 4, 18, 5), "heads": (3, 6, 12, 24), "ratio": 2},
    "base": {"embed": 128, "depths": (3, 4, 18, 5), "heads": (4, 8, 16, 32), "ratio": 2},
}
_SCALED = {"scale": 1e-5}
_LARGE = {"embed": 192, "depths": (3, 4, 18, 5), "heads": (6, 12, 24, 48), "ratio": 2}
# Dilations of the maps at 224 and at 384 pixels: every other block looks as far as the map allows.
_AT_224 = {"dilations": ((1, 8), (1, 4), (1, 2), (1,))}
_AT_384 = {"dilations": ((1, 13), (1, 6), (1, 3), (1,)), "image": 384}
_SWIN = {"layout": "swin", "ratio": 4, "heads": (3, 6, 12, 24), "embed": 96, "depths": (2, 2, 18, 2)} | _AT_224
_FLAT = {"layout": "flat", "ratio": 4, "depths": (12,), "heads": (12,), "embed": 384}
_FLAT_BASE = {"embed": 768, "heads": (24,)}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "nat_mini": _NAT["mini"],
    "nat_tiny": _NAT["tiny"],
    "nat_small": _NAT["small"] | _SCALED,
    "nat_base": _NAT["base"] | _SCALED,
    "dinat_mini": _NAT["mini"] | _AT_224,
    "dinat_tiny": _NAT["tiny"] | _AT_224,
    "dinat_small": _NAT["small"] | _AT_224,
    "dinat_base": _NAT["base"] | _SCALED | _AT_224,
    "dinat_large": _LARGE | _AT_224,
    "dinat_large_384": _LARGE | _AT_384,
    "dinat_large_384_11x11": _LARGE | _AT_224 | {"kernel": 11, "image": 384},
    "dinat_s_tiny": _SWIN | {"depths": (2, 2, 6, 2)},
    "dinat_s_small": _SWIN,
    "dinat_s_base": _SWIN | {"embed": 128, "heads": (4, 8, 16, 32)},
    "dinat_s_large": _SWIN | {"embed": 192, "heads": (6, 12, 24, 48)},
    "nat_isotropic_small": _FLAT,
    "nat_isotropic_base": _FLAT | _FLAT_BASE,
    "dinat_isotropic_small": _FLAT | {"dilations": ((1, 2),)},
    "dinat_isotropic_base": _FLAT | _FLAT_BASE | {"dilations": ((1, 2),)},
    "vitrpb_small": _FLAT | {"kernel": None},
    "vitrpb_base": _FLAT | _FLAT_BASE | {"kernel": None},
}


class Nat(BackboneEncoder):
    """NAT, DiNAT, DiNAT_s, their isotropic forms and the ViT they are compared with.

    Maps of any size: windows need kernel * dilation places a side, a smaller map is filled up with zeros inside the
    attention. Dilations are those of the variant whatever the size of the image; ``config: {dilations: ...}`` sets
    others (the rule of the paper: as many as the map has windows, kernel * dilation at most its side).
    """

    source: ClassVar[str] = "NAT (CVPR 2023), section 3; DiNAT (arXiv 2209.15001), section 3; official code"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = NatNet
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    smallest: ClassVar[int] = 32

    @property
    def blind(self) -> str:  # type: ignore[override]
        return "" if self.made_with["variant"].startswith("vitrpb") else "its blocks attend to windows"
