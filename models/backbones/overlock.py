"""OverLoCK, which looks over the picture first and then looks again: ``vision: {use: overlock, variant: xt}``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.kernels.neighborhood import neighborhood_aggregate, neighborhood_bias
from vlm.models.backbone import BackboneEncoder

Map = Float[Tensor, "n dim rows cols"]
Context = Float[Tensor, "n context rows cols"]

# Small kernels beside a large one, with their dilations; none reaches beyond it.
_BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
_REGIONS = 7  # of the overview, along a side


def _depthwise(dim: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(dim, dim, kernel, padding=padding, dilation=dilation, groups=dim, bias=bias)


class DilatedReparam(nn.Module):
    """A large depthwise convolution as a sum of it and smaller, dilated ones, each with its batch norm.

    ``merged`` is the one convolution that they come to once the statistics stand still; :meth:`merge` makes it.
    """

    def __init__(self, dim: int, kernel: int, merged: bool) -> None:
        super().__init__()
        self.kernel, self.merged = kernel, merged
        self.lk_origin = _depthwise(dim, kernel, bias=merged)
        if not merged:
            self.origin_bn = nn.BatchNorm2d(dim)
            for size, dilation in _BRANCHES[kernel]:
                self.add_module(f"dil_conv_k{size}_{dilation}", _depthwise(dim, size, dilation, bias=False))
                self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(dim))

    def forward(self, x: Map) -> Map:
        if self.merged:
            return self.lk_origin(x)
        out = self.origin_bn(self.lk_origin(x))
        for conv, norm in self._branches():
            out = out + norm(conv(x))
        return out

    def _branches(self) -> list[tuple[Any, Any]]:
        names = [f"k{size}_{dilation}" for size, dilation in _BRANCHES[self.kernel]]
        return [(self.get_submodule(f"dil_conv_{name}"), self.get_submodule(f"dil_bn_{name}")) for name in names]

    @torch.no_grad()
    def merge(self) -> None:
        """One convolution with a bias in place of all; the same in eval mode."""
        if self.merged:
            return
        weight, bias = torch.zeros_like(self.lk_origin.weight), torch.zeros_like(self.lk_origin.weight[:, 0, 0, 0])
        for conv, norm in [(self.lk_origin, self.origin_bn), *self._branches()]:
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            reach = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
            middle, step = self.kernel // 2, conv.dilation[0]
            at = slice(middle - reach, middle + reach + 1, step)
            weight[:, :, at, at] += conv.weight * factor[:, None, None, None]
            bias += norm.bias - norm.running_mean * factor
        convolution = _depthwise(len(weight), self.kernel).to(weight)
        convolution.weight.copy_(weight)
        assert convolution.bias is not None
        convolution.bias.copy_(bias)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.lk_origin, self.merged = convolution, True


class ResidualConv(nn.Conv2d):
    """x plus a 3 x 3 depthwise convolution of it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, input: Map) -> Map:
        return input + super().forward(input)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2): channels compete by their energy over the map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, dim, 1, 1)) for _ in range(2))

    def forward(self, x: Map) -> Map:
        energy = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        share = energy / (energy.mean(1, keepdim=True) + 1e-6)
        return x * (self.gamma * share + 1) + self.beta


class ChannelGate(nn.Module):
    """Squeeze and excitation: each channel weighed by what all of them are on average."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        few = max(16, dim // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, few, 1), nn.GELU(), nn.Conv2d(few, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Map) -> Map:
        return x * self.proj(x)


class ChannelScale(nn.Module):
    """A factor and a summand for each channel, shaped as a depthwise 1 x 1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim, 1, 1, 1)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Map) -> Map:
        return x * self.weight[:, 0] + self.bias[:, None, None]


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


class ContMixBlock(nn.Module):
    """Convolution whose kernels, one per place and group of channels, come of its affinity to regions of the context.

    The map is ``dim`` channels with ``context`` more, which say what the overview saw. Half of the groups' channels are
    summed with a small kernel, half with a large one, each a softmax over its window.

    Args:
        heads: half the number of groups. kernel, small: sides of the two windows.
        first: no context has gone through a block before, so that there is none to be renewed.
    """

    def __init__(
        self,
        dim: int,
        context: int,
        heads: int,
        kernel: int,
        small: int,
        ratio: float,
        first: bool,
        merged: bool,
        drop: float,
    ) -> None:
        super().__init__()
        whole, hidden, groups = dim + context, int(dim * ratio), 2 * heads
        self.dim, self.context, self.groups, self.kernel, self.small, self.first = (
            dim,
            context,
            groups,
            kernel,
            small,
            first,
        )
        self.rpb1 = nn.Parameter(torch.zeros(groups, 2 * small - 1, 2 * small - 1))
        self.rpb2 = nn.Parameter(torch.zeros(groups, 2 * kernel - 1, 2 * kernel - 1))
        if not first:
            self.x_scale, self.h_scale = ChannelScale(context), ChannelScale(context)
        self.dwconv1, self.norm1 = ResidualConv(whole), LayerNorm2d(whole, eps=1e-6)
        self.fusion = nn.Sequential(
            _depthwise(whole, 3), nn.BatchNorm2d(whole), nn.GELU(), nn.Conv2d(whole, dim, 1), ResponseNorm(dim)
        )
        self.weight_query = _projection(dim, dim // 2)
        self.weight_key = nn.Sequential(nn.AdaptiveAvgPool2d(_REGIONS), *_projection(context, dim // 2))
        self.weight_proj = nn.Conv2d(_REGIONS**2, small**2 + kernel**2, 1)
        self.dyconv_proj = _projection(dim, dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel, merged), nn.BatchNorm2d(dim))
        self.se_layer, self.gate = ChannelGate(dim), nn.Sequential(*_projection(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, whole, 1))
        self.dwconv2, self.norm2 = ResidualConv(whole), LayerNorm2d(whole, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Conv2d(whole, hidden, 1),
            nn.GELU(),
            ResidualConv(hidden),
            ResponseNorm(hidden),
            nn.Conv2d(hidden, whole, 1),
        )
        self.ls1, self.ls2 = ChannelScale(whole), ChannelScale(whole)
        self.drop_path = DropPath(drop)

    def forward(self, x: Map, h: Context, overview: Context) -> tuple[Map, Context]:
        """The map, its context and the overview at its size to the map and its context."""
        if not self.first:
            h = self.x_scale(h) + self.h_scale(overview)
        whole = self.dwconv1(torch.cat([x, h], 1))
        z = self.norm1(whole)
        x = self.fusion(z)
        out = self.dyconv_proj(self.mix(x, z)) + self.lepe(x)
        out = self.proj(self.gate(x) * self.se_layer(out))
        whole = self.dwconv2(self.ls1(whole) + self.drop_path(out))
        whole = self.ls2(whole) + self.drop_path(self.mlp(self.norm2(whole)))
        x, h = whole.split([self.dim, self.context], 1)
        return x, h

    def mix(self, x: Map, z: Float[Tensor, "n whole rows cols"]) -> Map:
        """The values ``x`` summed with the kernels that ``z``, map and context, makes.

        A map smaller than the large window is enlarged for it and its sums are averaged back.
        """
        size, least = (x.shape[2], x.shape[3]), min(x.shape[2:])
        if least < self.kernel:
            larger = [int(side * self.kernel / least) for side in size]
            x, z = (F.interpolate(each, size=larger, mode="bilinear", align_corners=False) for each in (x, z))
        shape = x.shape[2], x.shape[3]
        near, far = self._kernels(z).split([self.small**2, self.kernel**2], -1)
        sums = []
        halves = x.unflatten(1, (2, self.groups, -1)).flatten(4).transpose(3, 4).unbind(1)  # [N,G,L,D]
        for values, logits, table, side in (
            (halves[0], near, self.rpb1, self.small),
            (halves[1], far, self.rpb2, self.kernel),
        ):
            weights = (logits + neighborhood_bias(table, shape, side)).softmax(-1).to(values.dtype)
            sums.append(neighborhood_aggregate(weights, values, shape, side))
        out = torch.stack(sums, 1).transpose(3, 4).flatten(1, 3).unflatten(2, shape)
        return out if shape == size else F.adaptive_avg_pool2d(out, size)

    def _kernels(self, z: Map) -> Float[Tensor, "n groups places weights"]:
        """Scores of the places of both windows, from the affinity of each place to the regions of the context."""
        q = self.weight_query(z[:, : self.dim]) * (self.dim / self.groups) ** -0.5
        k = self.weight_key(z[:, self.dim :])
        q, k = (each.flatten(2).unflatten(1, (self.groups, -1)) for each in (q, k))
        affinity = q.transpose(2, 3) @ k  # [N,G,L,regions]
        return F.linear(affinity, self.weight_proj.weight.flatten(1), self.weight_proj.bias)


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


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
