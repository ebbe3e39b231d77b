"""LITv2, whose heads divide high and low frequencies: ``vision: {use: litv2, variant: s}``."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder, init_linear


class HiLo(nn.Module):
    """Heads for details attend within squares of ``window``, the others to the squares' averages.

    window = 1 leaves nothing inside a square, so that all heads are of the second kind: plain attention. A map that is
    no multiple of the window is filled up with zeros on the right and below.

    Args:
        share: of the heads that attend to averages, rounded down.
    """

    def __init__(self, dim: int, heads: int, window: int, share: float = 0.9) -> None:
        super().__init__()
        width = dim // heads
        self.window, self.low_heads = window, heads if window == 1 else int(heads * share)
        self.high_heads = heads - self.low_heads
        low, high = self.low_heads * width, self.high_heads * width
        if low:
            self.l_q, self.l_kv, self.l_proj = nn.Linear(dim, low), nn.Linear(dim, 2 * low), nn.Linear(low, low)
        if high:
            self.h_qkv, self.h_proj = nn.Linear(dim, 3 * high), nn.Linear(high, high)

    def forward(self, x: Float[Tensor, "n rows cols dim"]) -> Float[Tensor, "n rows cols dim"]:
        rows, cols = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -cols % self.window, 0, -rows % self.window))
        parts = [self._high(x)] if self.high_heads else []
        parts += [self._low(x)] if self.low_heads else []
        return torch.cat(parts, -1)[:, :rows, :cols]

    def _high(self, x: Float[Tensor, "n rows cols dim"]) -> Float[Tensor, "n rows cols high"]:
        s, (n, rows, cols) = self.window, x.shape[:3]
        qkv = self.h_qkv(x).view(n, rows // s, s, cols // s, s, 3, self.high_heads, -1)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, self.high_heads, s * s, qkv.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v)  # [squares,H,s*s,D]
        out = out.view(n, rows // s, cols // s, self.high_heads, s, s, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.h_proj(out.reshape(n, rows, cols, -1))

    def _low(self, x: Float[Tensor, "n rows cols dim"]) -> Float[Tensor, "n rows cols low"]:
        n, rows, cols = x.shape[:3]
        q = self.l_q(x).view(n, rows * cols, self.low_heads, -1).transpose(1, 2)
        averages = x
        if self.window > 1:
            averages = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window).permute(0, 2, 3, 1)
        k, v = self.l_kv(averages).flatten(1, 2).unflatten(2, (2, self.low_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # [N,H,L,D]
        return self.l_proj(out.transpose(1, 2).reshape(n, rows, cols, -1))


class _DepthwiseConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "n rows cols dim"]) -> Float[Tensor, "n rows cols dim"]:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvMlp(nn.Module):
    """An MLP whose hidden layer sees its 3 x 3 neighbours: what positions the blocks know of."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = nn.Linear(dim, hidden), _DepthwiseConv(hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "n rows cols dim"]) -> Float[Tensor, "n rows cols dim"]:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """Attention (none in the first stages) and a convolutional MLP."""

    def __init__(self, dim: int, ratio: float, attention: nn.Module | None, drop: float) -> None:
        super().__init__()
        if attention is not None:
            self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2, self.mlp = nn.LayerNorm(dim), ConvMlp(dim, int(dim * ratio))
        self.drop_path = DropPath(drop)

    def forward(self, x: Float[Tensor, "n rows cols dim"]) -> Float[Tensor, "n rows cols dim"]:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeformableConv(nn.Module):
    """A 2 x 2 convolution of stride 2 whose four taps move to where ``conv_offset`` says.

    Taps in raster order, each with its offset down and right in pixels; samples are bilinear, zero outside of the map.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 2, 2))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.conv_offset = nn.Conv2d(inputs, 8, 2, 2)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Float[Tensor, "n inputs rows cols"]) -> Float[Tensor, "n outputs half_rows half_cols"]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        rows, cols = x.shape[2:]
        moved = self.conv_offset(x).float()  # [N,8,h,w]
        down = 2.0 * torch.arange(rows // 2, device=x.device)[:, None]
        right = 2.0 * torch.arange(cols // 2, device=x.device)
        exact = torch.promote_types(x.dtype, torch.float32)  # places in bf16 would be a pixel off
        taps = []
        for tap in range(4):
            y = down + tap // 2 + moved[:, 2 * tap]
            at = right + tap % 2 + moved[:, 2 * tap + 1]
            place = torch.stack([_unit(at, cols), _unit(y, rows)], -1)
            taps.append(F.grid_sample(x.to(exact), place.to(exact), align_corners=True).to(x.dtype))
        columns = torch.stack(taps, 2).flatten(1, 2)  # [N,inputs*4,h,w]
        return F.conv2d(columns, self.weight.flatten(1)[..., None, None], self.bias)


def _unit(place: Tensor, count: int) -> Tensor:
    """Pixels 0..count-1 to -1..1."""
    return place * (2 / (count - 1)) - 1


class TokenMerging(nn.Module):
    """To half the sides and twice the width, by a convolution that chooses where it looks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dconv, self.norm_layer = DeformableConv(dim, 2 * dim), nn.BatchNorm2d(2 * dim)

    def forward(self, x: Float[Tensor, "n rows cols dim"]) -> Tensor:
        return F.gelu(self.norm_layer(self.dconv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks of one width, then the way to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class PatchEmbed(nn.Module):
    """One linear map per 4 x 4 pixels; channels last. What is left over is filled up with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, 4, 4), nn.LayerNorm(dim)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n rows cols dim"]:
        images = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Litv2Net(nn.Module):
    """Stages of convolutional MLPs, then stages with HiLo attention before them.

    Args:
        embed: width of the first stage, doubled by each one after it. depths, heads: of the stages.
        windows: of HiLo by stage; None for a stage without attention.
        share: of the heads that attend to averages. ratio: width of the MLP's hidden layer over that of the block.
        drop_path: rate of stochastic depth of the last block, growing from 0.
        classes: of the head.
    """

    def __init__(
        self,
        embed: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        windows: Sequence[int | None] = (None, None, 2, 1),
        share: float = 0.9,
        ratio: float = 4,
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed)
        drop = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        stages = []
        for number, (depth, count, window) in enumerate(zip(depths, heads, windows, strict=True)):
            dim = embed * 2**number
            blocks = [
                Block(dim, ratio, None if window is None else HiLo(dim, count, window, share), drop.pop(0))
                for _ in range(depth)
            ]
            stages.append(Stage(blocks, None if number == len(depths) - 1 else TokenMerging(dim)))
        self.layers = nn.ModuleList(stages)
        width = embed * 2 ** (len(depths) - 1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.stages = len(depths)
        self.apply(init_linear)
        self.apply(_init_depthwise)

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim rows cols"]]:
        x = self.patch_embed(images)  # [N,h,w,V]
        steps: Any = self.layers
        for number, stage in enumerate(steps):
            for block in stage.blocks:
                x = block(x)
            last = number == self.stages - 1
            yield (self.norm(x) if last else x).permute(0, 3, 1, 2)
            if not last:
                x = stage.downsample(x)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.maps(images)
        return self.head(last.mean((2, 3)))


def _init_depthwise(module: nn.Module) -> None:
    if isinstance(module, _DepthwiseConv):
        nn.init.normal_(module.dwconv.weight, 0, math.sqrt(2 / 9))
        assert module.dwconv.bias is not None
        nn.init.zeros_(module.dwconv.bias)


_BASE = {"embed": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}


class Litv2(BackboneEncoder):
    """LITv2: no attention at high resolution, then HiLo, with merging of tokens that is learned (deformable).

    Images of any size: there are no position tables, odd maps are filled up with zeros.
    """

    source: ClassVar[str] = "LITv2 (NeurIPS 2022), section 3; LIT (AAAI 2022), section 3.3; official code"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = Litv2Net
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "s": {},
        "m": {"depths": (2, 2, 18, 2)},
        "b": _BASE,
        "b_384": _BASE | {"image": 384},
    }
    blind = "its first stages have no attention, the others mix it with windows"
