"""Meta-SpikeFormer (Spike-driven Transformer V2): neurons that fire or not between all layers, and no softmax."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder, init_linear

SLOPE = 4.0  # of the surrogate gradient
DECAY = 2.0  # time constant of the membrane


class Spike(torch.autograd.Function):
    """1 where the membrane reaches the threshold, else 0; backwards the slope of a sigmoid in its place."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above >= 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (above,) = ctx.saved_tensors
        fired = (SLOPE * above).sigmoid()
        return gradients[0] * SLOPE * fired * (1 - fired)


def spike(above: Tensor) -> Tensor:
    """:class:`Spike`, in plain operations where a compiler would trace its two passes apart at every neuron."""
    if not torch.compiler.is_compiling():
        return Spike.apply(above)  # type: ignore[return-value]
    smooth = (SLOPE * above).sigmoid()
    return (above >= 0).to(above.dtype) + (smooth - smooth.detach())  # adds 0 and brings its gradient


class Neuron(nn.Module):
    """Leaky integrate-and-fire over the time steps, starting at rest in every pass; it has no weights.

    v <- v + (x - v) / 2; a spike at the threshold puts v to 0. The reset has no gradient.
    """

    def __init__(self, threshold: float = 1.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Float[Tensor, "time n ..."]) -> Float[Tensor, "time n ..."]:
        first, *later = x.unbind()
        membrane = first / DECAY  # it starts at 0
        spikes = [spike(membrane - self.threshold)]
        for now in later:
            membrane = membrane * (1 - spikes[-1].detach())
            membrane = membrane + (now - membrane) / DECAY
            spikes.append(spike(membrane - self.threshold))
        return torch.stack(spikes) if later else spikes[0][None]


def still(layer: nn.Module, x: Float[Tensor, "time n ..."]) -> Float[Tensor, "time n ..."]:
    """A layer without memory, on every time step."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class _NormAndPad(nn.Module):
    """Batch norm, then a border of one pixel of what it makes of 0: as if zeros had been padded before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "n dim h w"]) -> Float[Tensor, "n dim h2 w2"]:
        norm: Any = self.bn
        zero = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        border = F.pad(zero.new_zeros(x.shape[2:]), (1, 1, 1, 1), value=1.0)  # [h2,w2]
        return F.pad(norm(x), (1, 1, 1, 1)) + border * zero[:, None, None]


class _RepConv(nn.Module):
    """Linear layers in a row that deployment could fold into one 3 x 3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = nn.Sequential(
            nn.Conv2d(dim, dim, 3, groups=dim, bias=False), nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
        )
        self.body = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), _NormAndPad(dim), inner)

    def forward(self, x: Float[Tensor, "n dim h w"]) -> Float[Tensor, "n dim h w"]:
        return self.body(x)


def _rep(dim: int) -> nn.Sequential:
    return nn.Sequential(_RepConv(dim), nn.BatchNorm2d(dim))


class SpikeAttention(nn.Module):
    """Spike-driven self-attention: queries, keys and values are spikes, and ``q (k^T v)`` needs no softmax."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_lif, self.q_lif, self.k_lif, self.v_lif = Neuron(), Neuron(), Neuron(), Neuron()
        self.attn_lif = Neuron(0.5)
        self.q_conv, self.k_conv, self.v_conv, self.proj_conv = _rep(dim), _rep(dim), _rep(dim), _rep(dim)

    def forward(self, x: Float[Tensor, "time n dim h w"]) -> Float[Tensor, "time n dim h w"]:
        x = self.head_lif(x)
        layers = ((self.q_conv, self.q_lif), (self.k_conv, self.k_lif), (self.v_conv, self.v_lif))
        q, k, v = (
            fire(still(conv, x)).unflatten(2, (self.heads, -1)).flatten(4).transpose(3, 4) for conv, fire in layers
        )  # [T,N,H,h w,d]
        out = q @ (k.transpose(3, 4) @ v) * 0.125
        out = self.attn_lif(out.transpose(3, 4).reshape(x.shape))
        return still(self.proj_conv, out)


class SpikeMlp(nn.Module):
    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1_lif, self.fc2_lif = Neuron(), Neuron()
        self.fc1_conv, self.fc1_bn = nn.Conv1d(dim, ratio * dim, 1), nn.BatchNorm1d(ratio * dim)
        self.fc2_conv, self.fc2_bn = nn.Conv1d(ratio * dim, dim, 1), nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "time n dim h w"]) -> Float[Tensor, "time n dim h w"]:
        out = still(self.fc1_bn, still(self.fc1_conv, self.fc1_lif(x.flatten(3))))
        return still(self.fc2_bn, still(self.fc2_conv, self.fc2_lif(out))).reshape(x.shape)


class Block(nn.Module):
    """Spike-driven attention and MLP, each added to what entered it."""

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.attn, self.mlp = SpikeAttention(dim, heads), SpikeMlp(dim)

    def forward(self, x: Float[Tensor, "time n dim h w"]) -> Float[Tensor, "time n dim h w"]:
        x = x + self.attn(x)
        return x + self.mlp(x)


class SepConv(nn.Module):
    """Separable convolution of spikes: out to twice the width, 7 x 7 each channel, and back."""

    def __init__(self, dim: int, ratio: int = 2) -> None:
        super().__init__()
        inner = ratio * dim
        self.lif1, self.lif2 = Neuron(), Neuron()
        self.pwconv1, self.bn1 = nn.Conv2d(dim, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.dwconv = nn.Conv2d(inner, inner, 7, padding=3, groups=inner, bias=False)
        self.pwconv2, self.bn2 = nn.Conv2d(inner, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "time n dim h w"]) -> Float[Tensor, "time n dim h w"]:
        out = self.lif2(still(self.bn1, still(self.pwconv1, self.lif1(x))))
        return still(self.bn2, still(self.pwconv2, still(self.dwconv, out)))


class ConvBlock(nn.Module):
    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.Conv = SepConv(dim)
        self.lif1, self.lif2 = Neuron(), Neuron()
        self.conv1, self.bn1 = nn.Conv2d(dim, ratio * dim, 3, padding=1, bias=False), nn.BatchNorm2d(ratio * dim)
        self.conv2, self.bn2 = nn.Conv2d(ratio * dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "time n dim h w"]) -> Float[Tensor, "time n dim h w"]:
        x = x + self.Conv(x)
        out = self.lif2(still(self.bn1, still(self.conv1, self.lif1(x))))
        return x + still(self.bn2, still(self.conv2, out))


class Downsample(nn.Module):
    def __init__(self, inward: int, outward: int, side: int, stride: int, fires: bool = True) -> None:
        super().__init__()
        self.encode_lif = Neuron() if fires else nn.Identity()
        self.encode_conv = nn.Conv2d(inward, outward, side, stride, side // 2)
        self.encode_bn = nn.BatchNorm2d(outward)

    def forward(self, x: Float[Tensor, "time n inward h w"]) -> Float[Tensor, "time n outward h2 w2"]:
        return still(self.encode_bn, still(self.encode_conv, self.encode_lif(x)))


class Network(nn.Module):
    """dims: widths at strides 4, 8, 16 and again 16; stride 2 has half the first. steps: times a picture is shown.

    distilled: a second head, whose logits are averaged with the first one's.
    """

    stages = 5

    def __init__(
        self,
        dims: Sequence[int],
        heads: int = 8,
        depths: tuple[int, int] = (6, 2),
        steps: int = 1,
        classes: int = 1000,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        a, b, c, d = dims
        self.steps = steps
        self.downsample1_1 = Downsample(3, a // 2, 7, 2, fires=False)
        self.ConvBlock1_1 = nn.ModuleList([ConvBlock(a // 2)])
        self.downsample1_2 = Downsample(a // 2, a, 3, 2)
        self.ConvBlock1_2 = nn.ModuleList([ConvBlock(a)])
        self.downsample2 = Downsample(a, b, 3, 2)
        self.ConvBlock2_1 = nn.ModuleList([ConvBlock(b)])
        self.ConvBlock2_2 = nn.ModuleList([ConvBlock(b)])
        self.downsample3 = Downsample(b, c, 3, 2)
        self.block3 = nn.ModuleList(Block(c, heads) for _ in range(depths[0]))
        self.downsample4 = Downsample(c, d, 3, 1)
        self.block4 = nn.ModuleList(Block(d, heads) for _ in range(depths[1]))
        self.lif = Neuron()
        self.head = nn.Linear(d, classes)
        self.head_kd = nn.Linear(d, classes) if distilled else None
        self.apply(init_linear)

    def currents(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "time n dim h w"]]:
        """What enters the next neurons after each stage, at every time step."""
        x = images.expand(self.steps, *images.shape)
        for down, *stage in (
            (self.downsample1_1, self.ConvBlock1_1),
            (self.downsample1_2, self.ConvBlock1_2),
            (self.downsample2, self.ConvBlock2_1, self.ConvBlock2_2),
            (self.downsample3, self.block3),
            (self.downsample4, self.block4),
        ):
            x = down(x)
            for block in chain.from_iterable(stage):
                x = block(x)
            yield x

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim h w"]]:
        for current in self.currents(images):
            yield current.mean(0)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.currents(images)
        fired = self.lif(last.flatten(3).mean(3))  # [T,N,dim]
        logits = self.head(fired).mean(0)
        return logits if self.head_kd is None else (logits + self.head_kd(fired).mean(0)) / 2


class Metaspikeformer(BackboneEncoder):
    """Spike-driven Transformer V2, as features the mean over time of what enters the neurons, strides 2 to 16.

    ``config: {steps: 4}`` shows every picture four times, as the published fine-tuned weights want it. The slope of the
    gradient through a spike is that of spikingjelly's default, from memory.
    """

    source: ClassVar[str] = (
        "Spike-driven Transformer V2 (ICLR 2024), section 3; official code has no licence: from text"
    )
    verified: ClassVar[str] = "golden (one time step; a block at two); published keys"

    network = Network
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "15m": {"dims": (64, 128, 256, 360)},
        "31m": {"dims": (96, 192, 384, 480)},
        "55m": {"dims": (128, 256, 512, 640)},
        "55m_distilled": {"dims": (128, 256, 512, 640), "steps": 4, "distilled": True},
        "124m": {"dims": (192, 384, 768, 960)},
    }
    smallest = 16
    multiple = 16
    heads = ("head", "head_kd")
    normalized = "all"
