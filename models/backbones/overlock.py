"""OverLoCK, which looks over the picture first and then looks again: ``vision: {use: overlock, variant: xt}``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder
from vlm.models.contmix import (
    ChannelGate,
    ChannelScale,
    Context,
    ContMixBlock,
    DilatedReparam,
    Map,
    ResidualConv,
    ResponseNorm,
)


class RepConvBlock(nn.Module):
    """The convolutional block of the base and overview networks; ``scaled`` weighs its shortcut."""

    def __init__(self, dim: int, kernel: int, ratio: float, scaled: bool, merged: bool, drop: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.dwconv = ResidualConv(dim)
        self.proj = nn.Sequential(
            LayerNorm2d(dim, eps=1e-6),
            DilatedReparam(dim, kernel, merged),
            nn.BatchNorm2d(dim),
            ChannelGate(dim),
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            ResidualConv(hidden),
            ResponseNorm(hidden),
            nn.Conv2d(hidden, dim, 1),
            DropPath(drop),
        )
        self.ls = ChannelScale(dim) if scaled else nn.Identity()

    def forward(self, x: Map) -> Map:
        x = self.dwconv(x)
        return self.ls(x) + self.proj(x)


def _halving(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs))


def _stem(dim: int) -> nn.Sequential:
    half = dim // 2
    parts: list[nn.Module] = []
    for inputs, outputs, stride in ((3, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
        parts += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
    return nn.Sequential(*parts[:-1])


class FocusDownsampler(nn.Module):
    """Map and context to half their sides."""

    def __init__(self, inputs: int, dim: int, context: int) -> None:
        super().__init__()
        self.x_proj, self.h_proj = _halving(inputs, dim), _halving(context, context)

    def forward(self, x: Map, h: Context) -> tuple[Tensor, Tensor]:
        return self.x_proj(x), self.h_proj(h)


class OverlockNet(nn.Module):
    """Base network, overview of it, and the focus that reads the base again with the overview beside it.

    Args:
        dims, depths: of the base's three stages and the overview. focus: blocks of the focus's two stages, and heads.
        kernels: large kernels by stage; the focus has those of the last two. small: the focus's small kernel.
        ratio: width of hidden layers over that of a block in base and overview. focus_ratio: the same in the focus.
        merged: convolutions that were merged, for the published weights of that form.
        drop_path: rate of stochastic depth of the last block, growing from 0.
        classes: of the heads.
    """

    def __init__(
        self,
        dims: Sequence[int] = (56, 112, 256, 336),
        depths: Sequence[int] = (2, 2, 3, 2),
        focus: Sequence[int] = (6, 2),
        heads: Sequence[int] = (4, 6),
        kernels: Sequence[int] = (17, 15, 13, 7),
        small: int = 5,
        ratio: float = 4,
        focus_ratio: float = 3,
        merged: bool = False,
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stages, context = 4, dims[3] // 4
        drop = torch.linspace(0, drop_path, sum(depths) + sum(focus), device="cpu").tolist()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            self.add_module(f"patch_embed{i + 1}", _stem(dim) if i == 0 else _halving(dims[i - 1], dim))
            blocks = [RepConvBlock(dim, kernels[i], ratio, i > 1, merged, drop.pop(0)) for _ in range(depth)]
            self.add_module(f"blocks{i + 1}", nn.ModuleList(blocks))
        self.high_level_proj = nn.Conv2d(dims[3], context, 1)
        self.patch_embedx = FocusDownsampler(dims[2], dims[3], context)
        for i, depth in enumerate(focus):
            blocks = [
                ContMixBlock(
                    dims[2 + i],
                    context,
                    heads[i],
                    kernels[2 + i],
                    small,
                    focus_ratio,
                    first=i == 0 and number == 0,
                    merged=merged,
                    drop=drop.pop(0),
                )
                for number in range(depth)
            ]
            self.add_module(f"sub_blocks{3 + i}", nn.ModuleList(blocks))
        self.aux_head = nn.Sequential(nn.BatchNorm2d(dims[3]), nn.AdaptiveAvgPool2d(1), nn.Conv2d(dims[3], classes, 1))
        self.head = nn.Sequential(
            nn.Conv2d(dims[3] + context, 1024, 1, bias=False),
            nn.BatchNorm2d(1024),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(1024, classes, 1),
        )
        self.apply(_init)

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Map]:
        x = self._base(1, images)
        yield x
        x = self._base(2, x)
        yield x
        x = self._base(3, x)
        overview = self.high_level_proj(self._base(4, x))
        h = enlarged = self._enlarged(overview, x)
        for stage, guide in ((3, enlarged), (4, overview)):
            if stage == 4:
                x, h = self.patch_embedx(x, h)
            for block in self._list(f"sub_blocks{stage}"):
                x, h = block(x, h, guide)
            yield torch.cat([x, h], 1)

    def _base(self, stage: int, x: Map) -> Tensor:
        x = self.get_submodule(f"patch_embed{stage}")(x)
        for block in self._list(f"blocks{stage}"):
            x = block(x)
        return x

    def _list(self, name: str) -> Any:
        return self.get_submodule(name)

    @staticmethod
    def _enlarged(x: Map, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.maps(images)
        return self.head(last).flatten(1)

    def auxiliary(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        """What the overview alone says; 0.4 of its loss is added in the published training."""
        x = images
        for stage in (1, 2, 3, 4):
            x = self._base(stage, x)
        return self.aux_head(x).flatten(1)

    def merge(self) -> "OverlockNet":
        """Every large convolution with those beside it as one, which does the same in eval mode and costs less."""
        for module in self.modules():
            if isinstance(module, DilatedReparam):
                module.merge()
        return self


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_PUBLISHED: dict[str, dict[str, Any]] = {
    "xt": {},
    "t": {"dims": (64, 128, 256, 512), "depths": (4, 4, 6, 2), "focus": (12, 2), "heads": (4, 8)},
    "s": {"dims": (64, 128, 320, 512), "depths": (6, 6, 8, 3), "focus": (16, 3), "heads": (8, 16)},
    "b": {"dims": (80, 160, 384, 576), "depths": (8, 8, 10, 4), "focus": (20, 4), "heads": (6, 9)},
}


class Overlock(BackboneEncoder):
    """OverLoCK XT to B, each in the form that trains and with merged convolutions (``_reparam``).

    Images of any size: a map smaller than the kernel is enlarged inside. Features at strides 16 and 32 are those of the
    focus, map and context side by side.
    """

    source: ClassVar[str] = "OverLoCK (CVPR 2025), sections 3.1 to 3.4; official code"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = OverlockNet
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **_PUBLISHED,
        **{f"{name}_reparam": {**settings, "merged": True} for name, settings in _PUBLISHED.items()},
    }
    heads: ClassVar[tuple[str, ...]] = ("head", "aux_head")
    normalized: ClassVar[Literal["inner", "all", "none"]] = "all"  # it has no norm after any stage
    blind = "it has convolutions, not attention"
