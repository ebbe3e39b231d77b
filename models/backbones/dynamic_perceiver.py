"""Dynamic Perceiver: latents grow beside a convolutional trunk, and a picture may leave at one of four exits."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder, init_linear
from vlm.models.errors import ModelError
from vlm.models.trunks import Trunk, divisible, mobilenet, regnet, resnet

LATENTS = (128, 64, 32, 16)  # in the four stages
KEYS = 7  # rows and columns of the map that latents look at
HEADS = (1, 2, 4, 8)  # of the latents' self-attention


class _Attention(nn.Module):
    """Attention with inner width ``width``; ``keys``: so many keys have a learned offset each."""

    def __init__(self, q_dim: int, kv_dim: int, width: int, heads: int, keys: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias = nn.Parameter(torch.zeros(1, keys, width)) if keys else None
        self.q_proj = nn.Linear(q_dim, width, bias=False)
        self.k_proj = nn.Linear(kv_dim, width, bias=False)
        self.v_proj = nn.Linear(kv_dim, width, bias=False)
        self.o_proj = nn.Linear(width, q_dim)

    def forward(self, x: Float[Tensor, "n queries q_dim"], seen: Float[Tensor, "n keys kv_dim"]) -> Tensor:
        k = self.k_proj(seen)
        if self.relative_position_bias is not None:
            k = k + self.relative_position_bias
        parts = (self.q_proj(x), k, self.v_proj(seen))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        return x + self.fc2(F.gelu(self.fc1(self.layernorm(x))))


class _Cross(nn.Module):
    def __init__(self, q_dim: int, kv_dim: int, width: int, keys: int) -> None:
        super().__init__()
        self.q_norm, self.kv_norm = nn.LayerNorm(q_dim), nn.LayerNorm(kv_dim)
        self.attention = _Attention(q_dim, kv_dim, width, 1, keys)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return x + self.attention(self.q_norm(x), self.kv_norm(seen))


class CrossLayer(nn.Module):
    """Tokens look at other tokens, then an MLP of their own width."""

    def __init__(self, q_dim: int, kv_dim: int, width: int, keys: int = 0) -> None:
        super().__init__()
        self.cross_attn = _Cross(q_dim, kv_dim, width, keys)
        self.mlp = _Mlp(q_dim, 1)

    def forward(self, x: Float[Tensor, "n queries q_dim"], seen: Float[Tensor, "n keys kv_dim"]) -> Tensor:
        return self.mlp(self.cross_attn(x, seen))


class _Self(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = _Attention(dim, dim, dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, normed)


class SelfLayer(nn.Module):
    """Latents look at each other, then an MLP of four times their width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _Self(dim, heads)
        self.mlp = _Mlp(dim, 4)

    def forward(self, x: Float[Tensor, "n latents dim"]) -> Float[Tensor, "n latents dim"]:
        return self.mlp(self.self_attn(x))


def _score(dim: int, classes: int, hidden: int) -> list[nn.Module]:
    """A classifier: one layer, or two with ``hidden`` channels between (MobileNetV3's)."""
    if not hidden:
        return [nn.Linear(dim, classes)]
    return [nn.Linear(dim, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, classes)]


class Network(nn.Module):
    """trunk: regnet, resnet50 or mobilenetv3, with its sizes. factors: self-attention layers of the four stages, in
    multiples of 3, 3, 9 and 3. latents: the maps are the latents of each stage instead of the trunk's.
    """

    stages = 4

    def __init__(
        self,
        trunk: str,
        factors: Sequence[int],
        depths: Sequence[int] = (),
        widths: Sequence[int] = (),
        group: int = 8,
        factor: float = 1.0,
        classes: int = 1000,
        latents: bool = False,
    ) -> None:
        super().__init__()
        made = _trunk(trunk, depths, widths, group, factor)
        self.cnn_stem, self.latents, dims = made.stem, latents, made.widths
        self._hold(trunk, made)
        self.latent = nn.Parameter(torch.empty(LATENTS[0], dims[0]))
        nn.init.trunc_normal_(self.latent, std=0.02, a=-2.0, b=2.0)
        for number, (dim, count, times) in enumerate(zip(dims, factors, (3, 3, 9, 3), strict=True), start=1):
            self.add_module(f"dwc{number}_x2z", nn.Conv2d(dim, dim, 7, padding=3, groups=dim))
            self.add_module(f"cross_att{number}_x2z", CrossLayer(dim, dim, dim, KEYS**2))
            if number > 1:
                self.add_module(f"cross_att{number}_z2x", CrossLayer(dim, dim, dim // 8))
            layers = (SelfLayer(dim, HEADS[number - 1]) for _ in range(times * count))
            self.add_module(f"self_att{number}", nn.Sequential(*layers))
        self.last_cross_att_z2x = CrossLayer(made.out, dims[3], made.out // 8)
        self.token_mixer = nn.ModuleList(nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in pairwise(LATENTS))
        self.token_expander = nn.ModuleList(nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b)) for a, b in pairwise(dims))
        hidden = divisible(1280 * factor) if trunk == "mobilenetv3" else 0
        self.early_classifier3 = nn.Linear(dims[2], classes)
        self.isc3, self.isc4 = (
            nn.Sequential(nn.Linear(classes, dims[3]), nn.BatchNorm1d(dims[3]), nn.ReLU()) for _ in range(2)
        )
        self.classifier_att = nn.Linear(2 * dims[3], classes)
        cnn = _score(made.out, classes, hidden)
        self.classifier_cnn = nn.Sequential(*cnn) if hidden else cnn[0]
        merged = made.out + 2 * dims[3]
        self.classifier_merge = nn.Sequential(nn.BatchNorm1d(merged), *_score(merged, classes, hidden))
        self.apply(init_linear)

    def _hold(self, trunk: str, made: Trunk) -> None:
        """The trunk's stages under the names that the checkpoints give them."""
        if trunk == "regnet":
            self.cnn_body = nn.Sequential()
        for number, stage in enumerate(made.stages, start=1):
            if trunk == "regnet":
                self.cnn_body.add_module(f"block{number}", stage)
            else:
                self.add_module(f"cnn_body_stage{number}", stage)
        self._stages = [
            f"cnn_body.block{number}" if trunk == "regnet" else f"cnn_body_stage{number}" for number in range(1, 5)
        ]

    def _grow(self, number: int, x: Float[Tensor, "n dim h w"], z: Float[Tensor, "n latents dim"]) -> Tensor:
        """The latents of a stage: they look at the map that enters it, then at each other."""
        seen = x + self.get_submodule(f"dwc{number}_x2z")(x)
        seen = F.adaptive_avg_pool2d(seen, KEYS).flatten(2).transpose(1, 2)  # [N,49,dim]
        return self.get_submodule(f"self_att{number}")(self.get_submodule(f"cross_att{number}_x2z")(z, seen))

    def _mix(self, number: int, z: Float[Tensor, "n latents dim"]) -> Tensor:
        """Half as many latents, as wide as the next stage's map."""
        fewer = self.token_mixer[number - 1](z.transpose(1, 2)).transpose(1, 2)
        return self.token_expander[number - 1](fewer)

    def walk(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[tuple[str, int, Tensor]]:
        """What the branches hold, as it comes: ("latents", stage, [N,Z,C]), ("trunk", stage, [N,C,h,w]) as it leaves
        the trunk's stage, and ("map", stage, [N,C,h,w]) after it looked at the latents."""
        x = self.cnn_stem(images)
        z = self.latent.expand(len(x), -1, -1)
        for number in range(1, 5):
            z = self._grow(number, x, z)
            yield "latents", number, z
            x = self.get_submodule(self._stages[number - 1])(x)
            yield "trunk", number, x
            z = self._mix(number, z) if number < 4 else z
            look = self.get_submodule(f"cross_att{number + 1}_z2x") if number < 4 else self.last_cross_att_z2x
            shape = x.shape[2:]
            x = look(x.flatten(2).transpose(1, 2), z).transpose(1, 2).unflatten(2, shape)
            yield "map", number, x

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim h w"]]:
        for kind, _, value in self.walk(images):
            if self.latents and kind == "latents":
                yield value.transpose(1, 2).unsqueeze(2)  # [N,C,1,Z]
            elif not self.latents and kind == "map":
                yield value

    def exits(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n classes"]]:
        """The logits of the four exits, each computed when it is asked for: from the third stage's latents, from the
        fourth's, from the trunk, from both."""
        early = latent = images
        for kind, number, value in self.walk(images):
            if (kind, number) == ("latents", 3):
                early = self.early_classifier3(value.mean(1))
                yield early
            elif (kind, number) == ("latents", 4):
                latent = value.mean(1)
                early = self.classifier_att(torch.cat([latent, self.isc3(early)], 1))
                yield early
            elif (kind, number) == ("trunk", 4):
                yield self.classifier_cnn(value.mean((2, 3)))
            elif (kind, number) == ("map", 4):
                yield self.classifier_merge(torch.cat([value.mean((2, 3)), latent, self.isc4(early)], 1))

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.exits(images)
        return last


def _trunk(name: str, depths: Sequence[int], widths: Sequence[int], group: int, factor: float) -> Trunk:
    if name == "regnet":
        return regnet(depths, widths, group)
    if name == "resnet50":
        return resnet((3, 4, 6, 3), factor)
    if name == "mobilenetv3":
        return mobilenet(factor)
    raise ModelError(
        f"model.vision.config: trunk: dynamic_perceiver has regnet, resnet50 and mobilenetv3; found {name!r}"
    )


def exit_thresholds(confidence: Float[Tensor, "samples exits"], share: Sequence[float]) -> Float[Tensor, " exits"]:
    """Confidence from which a picture leaves at each exit, so that of these samples so large a share does; the last
    exit takes the rest (its threshold is -inf).

    confidence: largest probability of each sample at each exit, on a validation split. share: of all samples, per exit.
    """
    left = torch.ones(len(confidence), dtype=torch.bool, device=confidence.device)
    found = torch.full((confidence.shape[1],), -torch.inf, device=confidence.device)
    for number in range(confidence.shape[1] - 1):
        count = min(round(share[number] * len(confidence)), int(left.sum()))
        known = confidence[:, number].masked_fill(~left, -torch.inf)
        found[number] = known.topk(count).values[-1] if count else torch.inf
        left &= confidence[:, number] < found[number]
    return found


def leaves_at(
    confidence: Float[Tensor, "samples exits"], thresholds: Float[Tensor, " exits"]
) -> Int[Tensor, " samples"]:
    """The first exit at which each sample is sure enough."""
    return (confidence >= thresholds).int().argmax(1)


_REG, _MOBILE = (1, 1, 1, 2), (1, 1, 1, 3)


class DynamicPerceiver(BackboneEncoder):
    """A convolutional trunk (RegNet-Y, ResNet-50, MobileNetV3) with latents beside it, and four exits.

    Features are the trunk's map after it looked at the latents, strides 4 to 32; with ``config: {latents: true}`` the
    latents of a stage themselves, 128, 64, 32 or 16 tokens of no place. What comes after the layer is removed, so an
    earlier layer is an earlier exit.
    """

    source: ClassVar[str] = "Dynamic Perceiver (ICCV 2023), section 3; official code"
    verified: ClassVar[str] = "golden (ResNet-50 x 0.5); published keys"

    network = Network
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reg400m": {"trunk": "regnet", "factors": _REG, "depths": (1, 3, 6, 6), "widths": (48, 104, 208, 440)},
        "reg800m": {
            "trunk": "regnet", "factors": _REG, "depths": (1, 3, 8, 2), "widths": (64, 144, 320, 784), "group": 16,
        },
        "reg1.6g": {
            "trunk": "regnet", "factors": _REG, "depths": (2, 6, 17, 2), "widths": (48, 120, 336, 888), "group": 24,
        },
        "reg3.2g": {
            "trunk": "regnet", "factors": _REG, "depths": (2, 5, 13, 1), "widths": (72, 216, 576, 1512), "group": 24,
        },
        "resnet50_x0.375": {"trunk": "resnet50", "factors": (1, 1, 1, 1), "factor": 0.375},
        "resnet50_x0.5": {"trunk": "resnet50", "factors": (1, 1, 1, 1), "factor": 0.5},
        "resnet50": {"trunk": "resnet50", "factors": (1, 1, 1, 1)},
        "mobilenetv3_x0.75": {"trunk": "mobilenetv3", "factors": _MOBILE, "factor": 0.75},
        "mobilenetv3": {"trunk": "mobilenetv3", "factors": _MOBILE},
    }  # fmt: skip
    heads = ("early_classifier3", "isc3", "isc4", "classifier_att", "classifier_cnn", "classifier_merge")
    normalized = "all"
    blind = "its blocks are convolutions, and latents that look at them"

    @property
    def spatial(self) -> bool:
        """A latent shows no part of the picture."""
        return not self.model.latents
