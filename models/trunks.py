"""Convolutional trunks in four stages, with the names of published checkpoints: RegNet-Y, ResNet-50, MobileNetV3-large.

Each has ``stem``, ``stages`` and the widths at which they begin and end; Dynamic Perceiver grows latents beside them.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Trunk(NamedTuple):
    """A stem, four stages, the width that enters each, and the width that leaves the last."""

    stem: nn.Sequential
    stages: list[nn.Sequential]
    widths: tuple[int, ...]
    out: int


def conv_norm(
    inward: int, outward: int, side: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = None,
    eps: float = 1e-5,
) -> nn.Sequential:  # fmt: skip
    """Convolution without bias, batch norm, and an activation if one is given."""
    conv = nn.Conv2d(inward, outward, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outward, eps=eps), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    """A gate per channel, from the mean of the map."""

    def __init__(self, dim: int, squeeze: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, squeeze, 1), nn.Conv2d(squeeze, dim, 1)
        self.gate = gate()

    def forward(self, x: Float[Tensor, "n dim h w"]) -> Float[Tensor, "n dim h w"]:
        return x * self.gate(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class RegnetBlock(nn.Module):
    """Bottleneck without a bottleneck: grouped 3 x 3 convolution between two 1 x 1, squeeze-and-excitation inside."""

    def __init__(self, inward: int, outward: int, stride: int, group: int) -> None:
        super().__init__()
        self.proj = conv_norm(inward, outward, 1, stride) if stride > 1 or inward != outward else None
        self.f = nn.Sequential()
        self.f.add_module("a", conv_norm(inward, outward, 1, act=nn.ReLU))
        self.f.add_module("b", conv_norm(outward, outward, 3, stride, outward // group, nn.ReLU))
        self.f.add_module("se", SqueezeExcite(outward, round(0.25 * inward), nn.Sigmoid))
        self.f.add_module("c", conv_norm(outward, outward, 1))

    def forward(self, x: Float[Tensor, "n inward h w"]) -> Float[Tensor, "n outward h2 w2"]:
        return F.relu((x if self.proj is None else self.proj(x)) + self.f(x))


def regnet(depths: Sequence[int], widths: Sequence[int], group: int) -> Trunk:
    """RegNet-Y: a stage's first block has stride 2."""
    stem = conv_norm(3, 32, 3, 2, act=nn.ReLU)
    stages, inward = [], 32
    for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        stage = nn.Sequential()
        for place in range(depth):
            block = RegnetBlock(inward, width, 1 if place else 2, group)
            stage.add_module(f"block{number}-{place}", block)
            inward = width
        stages.append(stage)
    return Trunk(stem, stages, (32, *widths[:3]), widths[3])


class Bottleneck(nn.Module):
    """ResNet's: 1 x 1, 3 x 3 (which has the stride), 1 x 1 to four times the width."""

    def __init__(self, inward: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inward, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        changes = stride > 1 or inward != 4 * width
        self.downsample = conv_norm(inward, 4 * width, 1, stride) if changes else None

    def forward(self, x: Float[Tensor, "n inward h w"]) -> Float[Tensor, "n outward h2 w2"]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet(depths: Sequence[int], factor: float) -> Trunk:
    """ResNet of bottlenecks, ``factor`` times as wide."""
    first = int(64 * factor)
    stem = nn.Sequential(
        nn.Conv2d(3, first, 7, 2, 3, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    stages, inward, widths = [], first, []
    for number, depth in enumerate(depths):
        widths.append(inward)
        blocks = []
        for place in range(depth):
            blocks.append(Bottleneck(inward, first * 2**number, 2 if number and not place else 1))
            inward = 4 * first * 2**number
        stages.append(nn.Sequential(*blocks))
    return Trunk(stem, stages, tuple(widths), inward)


class InvertedResidual(nn.Module):
    """MobileNetV3's: out to ``wide`` channels, each channel's own convolution, perhaps a gate, and back."""

    def __init__(
        self, inward: int, wide: int, outward: int, side: int, stride: int, gate: bool, act: type[nn.Module]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(inward, wide, 1, act=act, eps=1e-3)] if wide != inward else []
        layers.append(conv_norm(wide, wide, side, stride, wide, act, eps=1e-3))
        layers += [SqueezeExcite(wide, divisible(wide / 4), nn.Hardsigmoid)] if gate else []
        layers.append(conv_norm(wide, outward, 1, eps=1e-3))
        self.block = nn.Sequential(*layers)
        self.adds = stride == 1 and inward == outward

    def forward(self, x: Float[Tensor, "n inward h w"]) -> Float[Tensor, "n outward h2 w2"]:
        return x + self.block(x) if self.adds else self.block(x)


def divisible(value: float, by: int = 8) -> int:
    """The nearest multiple of ``by``, but never less than nine tenths of the value."""
    found = max(by, int(value + by / 2) // by * by)
    return found if found >= 0.9 * value else found + by


# kernel, wide, out, gate, hard swish, stride: the fifteen blocks of MobileNetV3-large (table 1 of its paper)
_MOBILE = (
    (3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1),
)  # fmt: skip


def mobilenet(factor: float) -> Trunk:
    """MobileNetV3-large, ``factor`` times as wide; blocks 1-2 with the stem, then 2, 3, 6 and 2 and the last layer."""
    inward = divisible(16 * factor)
    layers: list[nn.Module] = [conv_norm(3, inward, 3, 2, act=nn.Hardswish, eps=1e-3)]
    ends: list[int] = [inward]
    for side, wide, outward, gate, swish, stride in _MOBILE:
        sizes = divisible(wide * factor), divisible(outward * factor)
        layers.append(InvertedResidual(inward, *sizes, side, stride, gate, nn.Hardswish if swish else nn.ReLU))
        inward = sizes[1]
        ends.append(inward)
    layers.append(conv_norm(inward, 6 * inward, 1, act=nn.Hardswish, eps=1e-3))
    cuts = (3, 5, 8, 14, 17)
    stages = [nn.Sequential(*layers[a:b]) for a, b in pairwise(cuts)]
    return Trunk(nn.Sequential(*layers[:3]), stages, tuple(ends[cut - 1] for cut in cuts[:4]), 6 * inward)
