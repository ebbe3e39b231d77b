"""ContMix: convolutions whose kernels follow from what a place has to do with the regions of a context.

Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels" (CVPR 2025),
section 3.3; official code. OverLoCK's network builds on it; :class:`ContMix` is the block by itself, for any network.
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.kernels.neighborhood import neighborhood_aggregate, neighborhood_bias

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


def depthwise(dim: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(dim, dim, kernel, padding=padding, dilation=dilation, groups=dim, bias=bias)


class DilatedReparam(nn.Module):
    """A large depthwise convolution as a sum of it and smaller, dilated ones, each with its batch norm.

    ``merged`` is the one convolution that they come to once the statistics stand still; :meth:`merge` makes it.
    """

    def __init__(self, dim: int, kernel: int, merged: bool) -> None:
        super().__init__()
        self.kernel, self.merged = kernel, merged
        self.lk_origin = depthwise(dim, kernel, bias=merged)
        if not merged:
            self.origin_bn = nn.BatchNorm2d(dim)
            for size, dilation in _BRANCHES[kernel]:
                self.add_module(f"dil_conv_k{size}_{dilation}", depthwise(dim, size, dilation, bias=False))
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
        convolution = depthwise(len(weight), self.kernel).to(weight)
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

    def __init__(self, dim: int, start: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((dim, 1, 1, 1), start)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Map) -> Map:
        return x * self.weight[:, 0] + self.bias[:, None, None]


class DynamicKernels(nn.Module):
    """Sums of values over windows around each place, with weights that its affinity to the regions of a context makes.

    ``dim`` channels go in ``2 * heads`` groups; half of a group's channels are summed over ``small`` x ``small``, half
    over ``kernel`` x ``kernel`` places, each with a softmax over its window. Windows at the border are moved inside.
    """

    def __init__(self, dim: int, heads: int, kernel: int, small: int) -> None:
        super().__init__()
        groups = 2 * heads
        self.dim, self.groups, self.kernel, self.small = dim, groups, kernel, small
        self.rpb1 = nn.Parameter(torch.zeros(groups, 2 * small - 1, 2 * small - 1))
        self.rpb2 = nn.Parameter(torch.zeros(groups, 2 * kernel - 1, 2 * kernel - 1))
        self.weight_proj = nn.Conv2d(_REGIONS**2, small**2 + kernel**2, 1)

    def enlarged(self, x: Map) -> Float[Tensor, "n dim larger_rows larger_cols"]:
        """A map whose short side is smaller than the large window, enlarged to it."""
        sides, least = x.shape[2:], min(x.shape[2:])
        if least >= self.kernel:
            return x
        size = [self.kernel if side == least else int(self.kernel / least * side) for side in sides]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def sums(
        self,
        values: Map,
        query: Float[Tensor, "n half rows cols"],
        key: Float[Tensor, "n half region_rows region_cols"],
    ) -> Map:
        """The values summed with the kernels of the queries, those of the places, and keys, those of the regions."""
        shape = values.shape[2], values.shape[3]
        q, k = (x.flatten(2).unflatten(1, (self.groups, -1)) for x in (query * (self.dim / self.groups) ** -0.5, key))
        affinity = q.transpose(2, 3) @ k  # [N,G,L,regions]
        logits = F.linear(affinity, self.weight_proj.weight.flatten(1), self.weight_proj.bias)
        near, far = logits.split([self.small**2, self.kernel**2], -1)
        sums = []
        halves = values.unflatten(1, (2, self.groups, -1)).flatten(4).transpose(3, 4).unbind(1)  # [N,G,L,D]
        for half, scores, table, side in (
            (halves[0], near, self.rpb1, self.small),
            (halves[1], far, self.rpb2, self.kernel),
        ):
            weights = (scores + neighborhood_bias(table, shape, side)).softmax(-1).to(half.dtype)
            sums.append(neighborhood_aggregate(weights, half, shape, side))
        return torch.stack(sums, 1).transpose(3, 4).flatten(1, 3).unflatten(2, shape)


class ContMixBlock(DynamicKernels):
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
        super().__init__(dim, heads, kernel, small)
        whole, hidden = dim + context, int(dim * ratio)
        self.context, self.first = context, first
        if not first:
            self.x_scale, self.h_scale = ChannelScale(context), ChannelScale(context)
        self.dwconv1, self.norm1 = ResidualConv(whole), LayerNorm2d(whole, eps=1e-6)
        self.fusion = nn.Sequential(
            depthwise(whole, 3), nn.BatchNorm2d(whole), nn.GELU(), nn.Conv2d(whole, dim, 1), ResponseNorm(dim)
        )
        self.weight_query = projection(dim, dim // 2)
        self.weight_key = nn.Sequential(nn.AdaptiveAvgPool2d(_REGIONS), *projection(context, dim // 2))
        self.dyconv_proj = projection(dim, dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel, merged), nn.BatchNorm2d(dim))
        self.se_layer, self.gate = ChannelGate(dim), nn.Sequential(*projection(dim, dim), nn.SiLU())
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
        size = x.shape[2:]
        x, z = self.enlarged(x), self.enlarged(z)
        out = self.sums(x, self.weight_query(z[:, : self.dim]), self.weight_key(z[:, self.dim :]))
        return out if out.shape[2:] == size else F.adaptive_avg_pool2d(out, (size[0], size[1]))


class ContMix(DynamicKernels):
    """The block by itself, with an MLP behind it: a map is its own context.

    Args:
        dim: channels, a multiple of 4 * heads. heads: half the number of groups. kernel, small: sides of the windows.
        ratio: width of the MLP's hidden layer over ``dim``.
        scale: start of the layer scale; None for none. shortcut: it weighs what is passed by, as in OverLoCK; otherwise
            what is added.
        merged: convolutions that were merged. drop: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 2,
        kernel: int = 7,
        small: int = 5,
        ratio: float = 4,
        scale: float | None = None,
        shortcut: bool = False,
        merged: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, kernel, small)
        hidden, self.shortcut = int(dim * ratio), shortcut
        self.dwconv1, self.norm1 = ResidualConv(dim), LayerNorm2d(dim, eps=1e-6)
        self.weight_query, self.weight_value = projection(dim, dim // 2), projection(dim, dim)
        self.weight_key = nn.Sequential(nn.AdaptiveAvgPool2d(_REGIONS), *projection(dim, dim // 2))
        self.fusion_proj = projection(dim, dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel, merged), nn.BatchNorm2d(dim))
        self.se_layer, self.gate = ChannelGate(dim), nn.Sequential(*projection(dim, dim), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1))
        self.dwconv2, self.norm2 = ResidualConv(dim), LayerNorm2d(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1), nn.GELU(), ResidualConv(hidden), ResponseNorm(hidden), nn.Conv2d(hidden, dim, 1)
        )
        self.ls1, self.ls2 = (nn.Identity() if scale is None else ChannelScale(dim, scale) for _ in range(2))
        self.drop_path = DropPath(drop)
        for table in (self.rpb1, self.rpb2):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Map) -> Map:
        x = self.dwconv1(x)
        z = self.norm1(x)
        out = self.fusion_proj(self.mix(z)) + self.lepe(z)
        x = self.dwconv2(self._add(x, self.ls1, self.proj(self.gate(z) * self.se_layer(out))))
        return self._add(x, self.ls2, self.mlp(self.norm2(x)))

    def mix(self, z: Map) -> Map:
        """The values of a map summed with the kernels that it makes itself."""
        size, z = z.shape[2:], self.enlarged(z)
        out = self.sums(self.weight_value(z), self.weight_query(z), self.weight_key(z))
        return out if out.shape[2:] == size else F.adaptive_avg_pool2d(out, (size[0], size[1]))

    def _add(self, x: Map, scale: nn.Module, change: Map) -> Map:
        return scale(x) + self.drop_path(change) if self.shortcut else x + self.drop_path(scale(change))


def projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
