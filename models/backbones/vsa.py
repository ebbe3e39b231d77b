"""ViTAEv2 with windows that move and scale to what they attend to: ``vision: {use: vsa, variant: s}``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder, init_linear, relative_offsets

Map = Float[Tensor, "n dim rows cols"]
Out = Float[Tensor, "n outputs new_rows new_cols"]  # of another width or size than the map it was made of


class VariedSizeWindowAttention(nn.Module):
    """Attention within windows whose keys are sampled: each window and head says where its own lies and how large.

    A window's average decides, for each head, a shift (x and y) and a change of scale of the ``window`` x ``window``
    places at which keys and values are read, between places bilinearly, zero outside. Queries stay. A map that is no
    multiple of the window is filled up with zeros on the right and below; what fills it up counts as keys.

    Scores are divided by the root of a head's width of the *input*, which the published weights depend on.
    """

    relative_position_index: Tensor

    def __init__(self, inputs: int, outputs: int, heads: int, window: int = 7) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (inputs // heads) ** -0.5
        self.sampling_offsets, self.sampling_scales = (
            nn.Sequential(nn.AvgPool2d(window), nn.LeakyReLU(), nn.Conv2d(inputs, 2 * heads, 1)) for _ in range(2)
        )
        self.qkv, self.proj = nn.Conv2d(inputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_offsets(window, window))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def zero_predictors(self) -> None:
        """Windows that start where they are."""
        for predictor in (self.sampling_offsets, self.sampling_scales):
            for parameter in predictor.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Map) -> Float[Tensor, "n outputs rows cols"]:
        rows, cols = x.shape[2:]
        fill = (0, -cols % self.window, 0, -rows % self.window)
        places = self.places(F.pad(x, fill), rows, cols)  # [N*heads,Rows,Cols,2]
        qkv = F.pad(self.qkv(x), fill)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # [N,H,D,Rows,Cols]
        q, k, v = self._windows(q), self._sampled(k, places), self._sampled(v, places)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]  # [w^4,H]
        bias = bias.T.view(1, self.heads, self.window**2, -1).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)  # [N*windows,H,w*w,D]
        down, right = qkv.shape[2] // self.window, qkv.shape[3] // self.window
        out = out.view(len(x), down, right, self.heads, self.window, self.window, -1).permute(0, 3, 6, 1, 4, 2, 5)
        return self.proj(out.reshape(len(x), -1, *qkv.shape[2:])[:, :, :rows, :cols])

    def places(self, x: Map, rows: int, cols: int) -> Float[Tensor, "n_heads rows cols 2"]:
        """Where every head reads the keys of every place, x and y in -1..1 over the filled map ``x``; rows and cols
        are those of the map before it was filled up, in whose windows shifts are counted."""
        w, exact = self.window, torch.promote_types(x.dtype, torch.float32)  # in bf16 places would be a pixel off
        count = x.new_tensor([max(1, cols // w), max(1, rows // w)], dtype=exact)
        shift = self.sampling_offsets(x).to(exact).unflatten(1, (self.heads, 2)) / count[:, None, None]
        stretch = self.sampling_scales(x).to(exact).unflatten(1, (self.heads, 2))  # [N,H,2,down,right]
        along = []
        for axis, length in enumerate((x.shape[3], x.shape[2])):
            centre = torch.linspace(-1, 1, length, device=x.device, dtype=exact).view(-1, w).mean(1)
            inside = (torch.arange(w, device=x.device, dtype=exact) - (w - 1) / 2) * 2 / (length - 1)
            centre = centre[None, :] if axis == 0 else centre[:, None]  # [down,right], one of them 1
            middle = centre + shift[:, :, axis]  # [N,H,down,right]
            at = middle[..., None] + inside * (1 + stretch[:, :, axis, :, :, None])  # [N,H,down,right,w]
            at = at[:, :, :, None] if axis == 0 else at.permute(0, 1, 2, 4, 3)[..., None]
            along.append(at.expand(-1, -1, -1, w, -1, w).flatten(4, 5).flatten(2, 3))  # [N,H,Rows,Cols]
        return torch.stack(along, -1).flatten(0, 1)

    def _sampled(
        self, x: Float[Tensor, "n heads width rows cols"], places: Float[Tensor, "n_heads rows cols 2"]
    ) -> Float[Tensor, "windows heads places width"]:
        read = F.grid_sample(x.flatten(0, 1).to(places.dtype), places, align_corners=True)
        return self._windows(read.view_as(x).to(x.dtype))

    def _windows(self, x: Float[Tensor, "n heads width rows cols"]) -> Float[Tensor, "windows heads places width"]:
        w, (n, heads, width, rows, cols) = self.window, x.shape
        x = x.reshape(n, heads, width, rows // w, w, cols // w, w).permute(0, 3, 5, 1, 4, 6, 2)
        return x.reshape(-1, heads, w * w, width)


def _tokens(x: Map) -> Float[Tensor, "n rows cols dim"]:
    return x.permute(0, 2, 3, 1)


def _image(x: Float[Tensor, "n rows cols dim"]) -> Map:
    return x.permute(0, 3, 1, 2)


def _convolutions(widths: Sequence[int], strides: Sequence[int], groups: int) -> nn.Sequential:
    """Three 3 x 3 convolutions, the first two with batch norm and SiLU: the parallel convolutional module (PCM)."""
    parts: list[nn.Module] = []
    for i, stride in enumerate(strides):
        parts.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, groups=groups))
        parts += [nn.BatchNorm2d(widths[i + 1]), nn.SiLU()] if i < 2 else []
    return nn.Sequential(*parts)


class PyramidReduction(nn.Module):
    """Convolutions of several dilations side by side, each with GELU, their channels one after the other."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = -(-((kernel - 1) * dilation + 1 - stride) // 2)
            self.convs.append(
                nn.Sequential(nn.Conv2d(inputs, width, kernel, stride, padding, dilation=dilation), nn.GELU())
            )

    def forward(self, x: Map) -> Out:
        return torch.cat([conv(x) for conv in self.convs], 1)


class ReductionCell(nn.Module):
    """To a smaller map: pyramid of convolutions and attention, beside them plain convolutions."""

    def __init__(
        self,
        inputs: int,
        embed: int,
        dim: int,
        heads: int,
        ratio: int,
        dilations: Sequence[int],
        groups: int,
        wide: bool,
    ) -> None:
        super().__init__()
        self.ratio = ratio
        pyramid = embed * len(dilations)
        self.PRM = PyramidReduction(inputs, embed, 7 if ratio == 4 else 3, ratio, dilations)
        widths = [inputs, 2 * dim, 2 * dim, dim] if wide else [inputs, embed, embed, dim]
        self.PCM = _convolutions(widths, (2, 2, 1) if ratio == 4 else (2, 1, 1), groups)
        self.norm1, self.norm2 = nn.LayerNorm(pyramid), nn.LayerNorm(dim)
        self.pos = nn.Conv2d(pyramid, pyramid, 7, padding=3, groups=pyramid)
        self.attn = VariedSizeWindowAttention(pyramid, dim, heads)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Map) -> Out:
        x = F.pad(x, (0, -x.shape[3] % self.ratio, 0, -x.shape[2] % self.ratio))
        pyramid = self.PRM(x)
        found = self.attn(_image(self.norm1(_tokens(pyramid + self.pos(pyramid))))) + self.PCM(x)
        return found + _image(self.mlp(self.norm2(_tokens(found))))


class NormalCell(nn.Module):
    """Attention and convolutions side by side, then an MLP, each with its residual."""

    def __init__(self, dim: int, heads: int, groups: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.pos = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.attn, self.mlp = VariedSizeWindowAttention(dim, dim, heads), Mlp(dim, 4 * dim)
        self.PCM = _convolutions([dim, 4 * dim, dim, dim], (1, 1, 1), groups)
        self.drop_path = DropPath(drop)

    def forward(self, x: Map) -> Map:
        attended = self.attn(_image(self.norm1(_tokens(x + self.pos(x)))))
        x = x + self.drop_path(attended) + self.drop_path(self.PCM(x))
        return x + self.drop_path(_image(self.mlp(self.norm2(_tokens(x)))))


class Stage(nn.Module):
    def __init__(self, reduction: nn.Module, cells: Sequence[nn.Module]) -> None:
        super().__init__()
        self.RC, self.NC = reduction, nn.ModuleList(cells)


_RATIOS = (4, 2, 2, 2)
_DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))


class Vitaev2Net(nn.Module):
    """ViTAEv2: four stages, each a reduction cell and normal cells.

    Args:
        embed: widths of the convolutions in the reduction cells. dims, depths: of the normal cells, by stage.
        heads, reduction_heads: of the attention in normal and reduction cells.
        groups, reduction_groups: of the convolutions beside the attention.
        wide: those of the reduction cells are twice the stage's width.
        zero_predictors: windows start where they are; the published code starts the predictors at random.
        drop_path: rate of stochastic depth of the last normal cell, growing from 0.
        classes: of the head.
    """

    def __init__(
        self,
        embed: Sequence[int] = (64, 64, 128, 256),
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        reduction_heads: Sequence[int] = (2, 2, 4, 8),
        groups: Sequence[int] = (1, 32, 64, 128),
        reduction_groups: Sequence[int] = (1, 16, 32, 64),
        wide: bool = False,
        zero_predictors: bool = False,
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        drop = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        stages = []
        for i, dim in enumerate(dims):
            reduction = ReductionCell(
                3 if i == 0 else dims[i - 1],
                embed[i],
                dim,
                reduction_heads[i],
                _RATIOS[i],
                _DILATIONS[i],
                reduction_groups[i],
                wide,
            )
            cells = [NormalCell(dim, heads[i], groups[i], drop.pop(0)) for _ in range(depths[i])]
            stages.append(Stage(reduction, cells))
        self.layers, self.head = nn.ModuleList(stages), nn.Linear(dims[-1], classes)
        self.stages = len(stages)
        self.apply(init_linear)
        if zero_predictors:
            for module in self.modules():
                if isinstance(module, VariedSizeWindowAttention):
                    module.zero_predictors()

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Map]:
        x, steps = images, self.layers
        stages: Any = steps
        for stage in stages:
            x = stage.RC(x)
            for cell in stage.NC:
                x = cell(x)
            yield x

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.maps(images)
        return self.head(last.mean((2, 3)))


_WIDE = {"wide": True, "reduction_heads": (2, 4, 8, 16)}


class Vsa(BackboneEncoder):
    """ViTAEv2 with varied-size window attention, the one network with it whose weights are published.

    Images of any size: maps are filled up to whole windows and strides with zeros.
    """

    source: ClassVar[str] = "VSA (ECCV 2022), section 3; ViTAEv2 (IJCV 2023), section 3; written from their equations"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = Vitaev2Net
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "s": {},
        "wide_s": _WIDE,
        "wide_48m": {
            **_WIDE,
            "embed": (96, 96, 192, 384),
            "dims": (96, 192, 384, 768),
            "depths": (2, 2, 11, 2),
            "heads": (3, 6, 12, 24),
            "reduction_heads": (3, 6, 12, 24),
        },
        "wide_b": {
            **_WIDE,
            "embed": (128, 128, 256, 512),
            "dims": (128, 256, 512, 1024),
            "depths": (2, 2, 12, 2),
            "heads": (4, 8, 16, 32),
            "reduction_heads": (4, 8, 16, 32),
        },
    }
    normalized: ClassVar[Literal["inner", "all", "none"]] = "all"  # it has no norm after any stage
    blind = "its blocks attend to windows"
