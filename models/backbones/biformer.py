"""BiFormer, whose regions choose the regions they attend to: ``vision: {use: biformer, variant: tiny}``."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.kernels.selectors.biformer import biformer
from vlm.kernels.selectors.order import Order, boxes
from vlm.kernels.sparse import block_sparse_attention
from vlm.kernels.sparse.lists import BlockLists
from vlm.models.backbone import BackboneEncoder, init_linear

_REGIONS = 7  # along a side of the map
_FULL_HEADS = 8  # of full attention, whatever its width

Map = Float[Tensor, "n rows cols dim"]


class Pointwise(nn.Conv2d):
    """A linear map of channels that lie last, with the weights of a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class DepthwiseConv(nn.Conv2d):
    """A convolution of every channel on its own, of maps whose channels lie last."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, input: Map) -> Map:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _heads(x: Map, parts: int, heads: int) -> Float[Tensor, "parts n heads places width"]:
    return x.flatten(1, 2).unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _map(x: Float[Tensor, "n heads places width"], grid: Sequence[int]) -> Map:
    return x.transpose(1, 2).flatten(2).unflatten(1, tuple(grid))


def _attend(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, order: Order, scale: float) -> Tensor:
    """Attention of regions to the regions they list; tokens come and go in raster order."""
    # On the meta device, which a plan uses, lists have no values to walk, and the definition needs none.
    impl = "reference" if q.device.type == "meta" else "auto"
    q, k, v = (order.apply(x) for x in (q, k, v))
    out = block_sparse_attention(q, k, v, lists, causal=False, scale=scale, impl=impl, validate=False)
    assert isinstance(out, Tensor)
    return order.undo(out)


class RoutedAttention(nn.Module):
    """Bi-level routing attention, as in the weights of the paper: 7 x 7 regions whatever the size of the map.

    A map that is no multiple of 7 is filled up with zeros before the projection, on the right and below, so that what
    fills it up counts in means of regions and as keys. Scores are divided by the root of the whole width.
    """

    def __init__(self, dim: int, heads: int, topk: int) -> None:
        super().__init__()
        self.heads, self.topk, self.scale = heads, topk, dim**-0.5
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim)})
        self.wo, self.lepe = nn.Linear(dim, dim), DepthwiseConv(dim, 5)

    def forward(self, x: Map) -> Map:
        rows, cols = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -cols % _REGIONS, 0, -rows % _REGIONS))
        grid = x.shape[1], x.shape[2]
        q, k, v = _heads(self.qkv["qkv"](x), 3, self.heads)
        lists, order = biformer(q, k, grid=grid, regions=_REGIONS, topk=self.topk)
        out = _map(_attend(q, k, v, lists, order, self.scale), grid) + self.lepe(_map(v, grid))
        return self.wo(out)[:, :rows, :cols]


class RefactoredRoutedAttention(nn.Module):
    """The refactored code: the number of regions follows their size, and what fills a map up is zero after projection.

    Regions are as large as 7 of them along a side allow, so that there may be more; those at the end may be cut.
    """

    def __init__(self, dim: int, heads: int, topk: int) -> None:
        super().__init__()
        self.heads, self.topk, self.scale = heads, topk, dim**-0.5
        self.qkv_linear, self.output_linear = Pointwise(dim, 3 * dim), Pointwise(dim, dim)
        self.lepe = DepthwiseConv(dim, 5)

    def forward(self, x: Map) -> Map:
        rows, cols = x.shape[1:3]
        region = max(1, rows // _REGIONS), max(1, cols // _REGIONS)
        qkv = self.qkv_linear(x)
        lists = self._route(qkv, region)
        filled = F.pad(qkv, (0, 0, 0, -cols % region[1], 0, -rows % region[0]))
        grid = filled.shape[1], filled.shape[2]
        order = boxes("biformer", grid, region, x.device)
        q, k, v = _heads(filled, 3, self.heads)
        out = _map(_attend(q, k, v, lists, order, self.scale), grid)[:, :rows, :cols]
        return self.output_linear(out + self.lepe(qkv.chunk(3, -1)[2]))

    @torch.no_grad()
    def _route(self, qkv: Float[Tensor, "n rows cols three_dim"], region: tuple[int, int]) -> BlockLists:
        q, k, _ = qkv.permute(0, 3, 1, 2).chunk(3, 1)
        means = [F.avg_pool2d(each, region, ceil_mode=True, count_include_pad=False).flatten(2) for each in (q, k)]
        affinity = means[0].transpose(1, 2) @ means[1]  # [N,regions,regions]
        each = min(self.topk, affinity.shape[2])
        best = affinity.topk(each, -1).indices
        table = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, best, True)
        size = region[0] * region[1]
        return BlockLists.from_table(table[:, None], size, size, each)


class FullAttention(nn.Module):
    """All places attend to all. ``of_values``: whether the local part reads the values, or (as in the paper's weights)
    what the attention itself reads."""

    def __init__(self, dim: int, linear: Any, of_values: bool) -> None:
        super().__init__()
        self.of_values = of_values
        self.qkv, self.proj = linear(dim, 3 * dim, bias=False), linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5)

    def forward(self, x: Map) -> Map:
        qkv = self.qkv(x)
        q, k, v = _heads(qkv, 3, _FULL_HEADS)
        out = _map(F.scaled_dot_product_attention(q, k, v), x.shape[1:3])
        return self.proj(out + self.lepe(qkv.chunk(3, -1)[2] if self.of_values else x))


class Block(nn.Module):
    """Attention and MLP, before them a convolution for positions where ``position`` says so."""

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, position: bool, drop: float) -> None:
        super().__init__()
        if position:
            self.pos_embed = DepthwiseConv(dim, 3)
        self.position = position
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attention, mlp
        self.drop_path = DropPath(drop)

    def forward(self, x: Map) -> Map:
        if self.position:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiformerNet(nn.Module):
    """Four stages of routed attention; full attention in the last.

    Args:
        dims, depths: of the stages. topk: regions that a region attends to, by stage; None for full attention.
        head_dim: width of a head of routed attention. ratio: width of the MLP's hidden layer over that of the block.
        layout: ``"conv"`` overlapping convolutions between stages and a convolution for positions in each block;
            ``"swin"`` patches, no such convolution; ``"nchw"`` the same with the refactored attention.
        drop_path: rate of stochastic depth of the last block, growing from 0.
        classes: of the head.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        topk: Sequence[int | None] = (1, 4, 16, None),
        head_dim: int = 32,
        ratio: float = 3,
        layout: str = "conv",
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv, self.refactored = layout == "conv", layout == "nchw"
        down = _convolutions(dims) if self.conv else _patches(dims)
        drop = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        stages = []
        for dim, depth, k in zip(dims, depths, topk, strict=True):
            blocks = [
                Block(dim, self._attention(dim, dim // head_dim, k), self._mlp(dim, ratio), self.conv, drop.pop(0))
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(*blocks) if self.conv else nn.ModuleDict({"blocks": nn.Sequential(*blocks)}))
        self.downsample_layers, self.stages = nn.ModuleList(down), nn.ModuleList(stages)
        self.norm, self.head = nn.BatchNorm2d(dims[-1]), nn.Linear(dims[-1], classes)
        self.apply(init_linear)

    def _attention(self, dim: int, heads: int, topk: int | None) -> nn.Module:
        if topk is None:
            return FullAttention(dim, Pointwise if self.refactored else nn.Linear, of_values=self.refactored)
        return (RefactoredRoutedAttention if self.refactored else RoutedAttention)(dim, heads, topk)

    def _mlp(self, dim: int, ratio: float) -> nn.Module:
        linear = Pointwise if self.refactored else nn.Linear
        hidden = int(dim * ratio)
        # the published keys of the first layout count a place that holds nothing
        nothing = [nn.Identity()] if self.conv else []
        return nn.Sequential(linear(dim, hidden), *nothing, nn.GELU(), linear(hidden, dim))

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim rows cols"]]:
        x = images
        steps: Any = self.stages
        for number, stage in enumerate(steps):
            x = self.downsample_layers[number](x).permute(0, 2, 3, 1)
            x = (stage if self.conv else stage["blocks"])(x).permute(0, 3, 1, 2)
            yield self.norm(x) if number == len(steps) - 1 else x

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.maps(images)
        return self.head(last.mean((2, 3)))


def _convolutions(dims: Sequence[int]) -> list[nn.Module]:
    """The stem, which quarters the sides in two steps, and the halvings between stages."""

    def halve(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs)]

    stem = nn.Sequential(*halve(3, dims[0] // 2), nn.GELU(), *halve(dims[0] // 2, dims[0]))
    return [stem, *(nn.Sequential(*halve(a, b)) for a, b in pairwise(dims))]


def _patches(dims: Sequence[int]) -> list[nn.Module]:
    """Patches of 4 x 4 pixels, and of 2 x 2 places between stages."""
    stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), nn.BatchNorm2d(dims[0]))
    return [stem, *(nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(dims))]


_DEEP = {"depths": (4, 4, 18, 4)}
_SWIN = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "ratio": 4, "layout": "swin"}


class Biformer(BackboneEncoder):
    """BiFormer T, S and B, and the forms in Swin's layout (STL), with either of the two published attentions.

    Images of any size: maps that are no multiple of 7 are filled up inside the attention, as the authors do for
    detection. In the patch layouts what is left over on the right and below is cut off.
    """

    source: ClassVar[str] = "BiFormer (CVPR 2023), section 3; official code"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = BiformerNet
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {},
        "small": _DEEP,
        "base": _DEEP | {"dims": (96, 192, 384, 768)},
        "stl": _SWIN,
        "stl_nchw": _SWIN | {"layout": "nchw"},
    }
    blind = "its regions attend to a few regions each"
