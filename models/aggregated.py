"""TransNeXt's network: aggregated attention and the convolutional GLU, which MoH builds on too.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers" (CVPR 2024), section 3; official code.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.kernels.neighborhood import neighborhood_aggregate, neighborhood_attention
from vlm.kernels.plans import plan
from vlm.models.backbone import init_linear

Grid = tuple[int, int]  # rows, columns
_HIDDEN = 512  # of the network that makes position biases
_TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)  # softplus of it is 1 / 0.24


class Offsets(NamedTuple):
    """Coordinates of the offsets from queries to keys that occur on a grid, and which one each pair has."""

    coordinates: Float[Tensor, "offsets 2"]
    entry: Int[Tensor, "queries keys"]


class Counts(NamedTuple):
    """places: of the window around each place of a grid, so many lie inside the grid."""

    places: Float[Tensor, " places"]


@plan(Offsets)
def offsets(grid: Grid, keys: Grid, pretrained: Grid, device: torch.device) -> Offsets:
    """Offsets from the places of ``grid`` to those of ``keys``, which are averages of its places.

    They are counted in units of the grid that the network was pretrained on, 8 of which span it, and drawn together
    logarithmically; each pair that occurs is listed once.
    """
    along = []
    for count, fewer, reference in zip(grid, keys, pretrained, strict=True):
        place = torch.arange(count, dtype=torch.float32)
        pooled = F.adaptive_avg_pool1d(place[None], fewer)[0]
        t = (place[:, None] - pooled) / (reference - 1) * 8
        along.append((t.sign() * torch.log2(t.abs() + 1) / 3).unique(return_inverse=True))
    (rows, row_of), (cols, col_of) = along
    pairs = torch.cartesian_prod(rows, cols)
    index = row_of[:, None, :, None] * len(cols) + col_of[None, :, None, :]  # [h,w,rows of keys,columns of keys]
    index = index.reshape(grid[0] * grid[1], keys[0] * keys[1])
    return Offsets(pairs.to(device), index.to(device))


@plan(Counts)
def window_counts(grid: Grid, window: int, device: torch.device) -> Counts:
    """How many places of the window around each place lie inside the grid."""
    kernel = torch.ones(1, 1, window, window)
    return Counts(F.conv2d(torch.ones(1, 1, *grid), kernel, padding=window // 2).flatten().to(device))


class CosineAttention(nn.Module):
    """What both attentions have: unit queries and keys, a learned embedding beside the query, biases by offset.

    :meth:`weigh` is applied to what each head found, before the projection: heads count alike here.
    """

    def __init__(self, dim: int, heads: int, pretrained: Grid) -> None:
        super().__init__()
        self.heads, self.pretrained = heads, pretrained
        width = dim // heads
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), _TEMPERATURE))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(heads, 1, width), std=0.02))
        self.proj = nn.Linear(dim, dim)
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, _HIDDEN), nn.Linear(_HIDDEN, heads)

    def query(self, unit: Float[Tensor, "n heads places width"], seen: Tensor) -> Tensor:
        """The query that meets the keys; its length grows with the logarithm of how many keys it sees."""
        return (unit + self.query_embedding) * (F.softplus(self.temperature) * seen.log().to(unit.dtype))

    def bias(self, grid: Grid, keys: Grid) -> Float[Tensor, "heads queries keys"]:
        known = offsets(grid, keys, self.pretrained, self.proj.weight.device)
        made = self.cpb_fc2(F.relu(self.cpb_fc1(known.coordinates.to(self.proj.weight.dtype))))  # [offsets,H]
        return made.T.index_select(1, known.entry.flatten()).unflatten(1, known.entry.shape)

    def weigh(self, heads: Float[Tensor, "n heads places width"], x: Float[Tensor, "n places dim"]) -> Tensor:
        return heads

    def finish(self, heads: Float[Tensor, "n heads places width"], x: Float[Tensor, "n places dim"]) -> Tensor:
        return self.proj(self.weigh(heads, x).transpose(1, 2).flatten(2))


class GlobalCosineAttention(CosineAttention):
    """All places attend to all: the last stage."""

    def __init__(self, dim: int, heads: int, pretrained: Grid) -> None:
        super().__init__(dim, heads, pretrained)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Float[Tensor, "n places dim"], grid: Grid) -> Float[Tensor, "n places dim"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N,H,L,D]
        q = self.query(F.normalize(q, dim=-1), torch.tensor(float(x.shape[1])))
        bias = self.bias(grid, grid)[None].to(v.dtype)
        q, k = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)  # autocast has norms and embeddings in float32
        return self.finish(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1), x)


class AggregatedAttention(CosineAttention):
    """A place attends to the window around it and to the pooled map, in one softmax.

    Windows end at the border. Beside the softmax the values of a window are summed with weights that the query alone
    says, from learned tokens.
    """

    def __init__(self, dim: int, heads: int, pretrained: Grid, window: int, reduction: int) -> None:
        super().__init__(dim, heads, pretrained)
        self.window, self.reduction = window, reduction
        width, places = dim // heads, window**2
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(heads, places), std=0.0004))
        self.learnable_tokens = nn.Parameter(trunc_normal_(torch.empty(heads, width, places), std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, places))
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.sr, self.norm = nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "n places dim"], grid: Grid) -> Float[Tensor, "n places dim"]:
        pooled = max(1, grid[0] // self.reduction), max(1, grid[1] // self.reduction)
        unit = F.normalize(self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2), dim=-1)  # [N,H,L,D]
        seen = window_counts(grid, self.window, x.device).places + pooled[0] * pooled[1]
        k, v = self._keys_and_values(x)
        edge = self.window // 2  # the table of the kernel has offsets up to window - 1
        local = F.pad(self.relative_pos_bias_local.unflatten(1, (self.window, self.window)), (edge,) * 4)
        out = neighborhood_attention(
            self.query(unit, seen[:, None]).to(v.dtype),  # autocast has norms and embeddings in float32
            k,
            v,
            grid,
            self.window,
            bias=local,
            extra_kv=self._keys_and_values(self._pool(x, grid, pooled)),
            extra_bias=self.bias(grid, pooled),
            scale=1.0,
            border="clip",
        )
        spoken = unit @ self.learnable_tokens + self.learnable_bias  # [N,H,L,places]
        out = out + neighborhood_aggregate(spoken.to(v.dtype), v, grid, self.window, border="clip")
        return self.finish(out, x)

    def _pool(self, x: Tensor, grid: Grid, pooled: Grid) -> Float[Tensor, "n fewer dim"]:
        image = F.gelu(self.sr(x.transpose(1, 2).unflatten(2, grid)))
        return self.norm(F.adaptive_avg_pool2d(image, pooled).flatten(2).transpose(1, 2))

    def _keys_and_values(self, x: Float[Tensor, "n places dim"]) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N,H,L,D]
        return F.normalize(k, dim=-1).to(v.dtype), v


class DepthwiseConv(nn.Module):
    """A 3 x 3 convolution of every channel on its own, of places in raster order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "n places dim"], grid: Grid) -> Float[Tensor, "n places dim"]:
        return self.dwconv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class ConvGlu(nn.Module):
    """A gated MLP whose gate sees the 3 x 3 neighbours; two thirds as wide, so that it costs as a plain one."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = 2 * hidden // 3
        self.fc1, self.dwconv, self.fc2 = nn.Linear(dim, 2 * width), DepthwiseConv(width), nn.Linear(width, dim)

    def forward(self, x: Float[Tensor, "n places dim"], grid: Grid) -> Float[Tensor, "n places dim"]:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(self.dwconv(gate, grid)) * value)


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, ratio: float, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attention, ConvGlu(dim, int(dim * ratio))
        self.drop_path = DropPath(drop)

    def forward(self, x: Float[Tensor, "n places dim"], grid: Grid) -> Float[Tensor, "n places dim"]:
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class PatchEmbed(nn.Module):
    """An overlapping convolution and a norm: a map to its places in raster order, and their grid."""

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inputs, dim, kernel, stride, kernel // 2), nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "n inputs rows cols"]) -> tuple[Float[Tensor, "n places dim"], Grid]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class TransnextNet(nn.Module):
    """Four stages of aggregated attention; global attention where nothing is pooled.

    Args:
        dims, depths, ratios: widths, blocks, and widths of the MLPs over those of the blocks, by stage.
        head_dim: width of a head.
        reductions: sides of the map over those of the pooled map, by stage; None for global attention.
        window: side of the window.
        pretrained: side in pixels of the images that the weights were trained on; biases at other sizes continue the
            coordinates of that one.
        drop_path: rate of stochastic depth of the last block, growing from 0.
        classes: of the head.
    """

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        ratios: Sequence[float] = (8, 8, 4, 4),
        head_dim: int = 24,
        reductions: Sequence[int | None] = (8, 4, 2, None),
        window: int = 3,
        pretrained: int = 224,
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stages = len(dims)
        self.window, self.reductions = window, reductions
        drop = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            embed = PatchEmbed(3, dim, 7, 4) if i == 0 else PatchEmbed(dims[i - 1], dim, 3, 2)
            side = pretrained // (4 * 2**i)
            blocks = [
                Block(dim, self.attention(i, dim, dim // head_dim, (side, side)), ratios[i], drop.pop(0))
                for _ in range(depth)
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(dims[-1], classes)
        self.apply(init_linear)
        self.apply(_init_conv)

    def attention(self, stage: int, dim: int, heads: int, pretrained: Grid) -> nn.Module:
        """The attention of a block."""
        reduction = self.reductions[stage]
        if reduction is None:
            return GlobalCosineAttention(dim, heads, pretrained)
        return AggregatedAttention(dim, heads, pretrained, self.window, reduction)

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim rows cols"]]:
        x = images
        for i in range(1, self.stages + 1):
            tokens, grid = self.get_submodule(f"patch_embed{i}")(x)
            blocks = self.get_submodule(f"block{i}")
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                tokens = block(tokens, grid)
            x = self.get_submodule(f"norm{i}")(tokens).transpose(1, 2).unflatten(2, grid)
            yield x

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.maps(images)
        return self.head(last.mean((2, 3)))


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / out))
        assert module.bias is not None
        nn.init.zeros_(module.bias)


VARIANTS = {
    "micro": {},
    "tiny": {"dims": (72, 144, 288, 576)},
    "small": {"dims": (72, 144, 288, 576), "depths": (5, 5, 22, 5)},
    "base": {"dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5)},
}
