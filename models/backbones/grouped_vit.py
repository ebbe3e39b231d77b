"""A ViT whose heads share keys and values in groups: ``vision: {use: grouped_vit, encoder: {use: timm, ...}}``."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.encoder import Encoder, Features
from vlm.models.errors import ModelError
from vlm.models.part import Part

Kind = Literal["gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa"]
KINDS = ("gqa", "kdgqa", "dgqa_diff", "dgqa_ema", "pgqa")


class GroupedVit(Part):
    """A timm vision transformer with grouped-query attention, its weights converted: keys and values of a group are the
    mean of its heads'. What is lost is trained back ("up-training").

    Args:
        encoder: a plain vision transformer, as ``vision`` itself would name it.
        groups: key/value heads; they divide the number of heads. None: half as many as heads.
        grouping: how many query heads a group gets. ``gqa``: equally many; ``kdgqa``: by the norms of the batch's keys,
            anew in every pass; ``dgqa_diff`` and ``dgqa_ema``: by how these norms change, or by their moving average,
            while training, and fixed in evaluation; ``pgqa``: equally many, with normalised Gaussian noise taken off
            each head's output, in evaluation too, as published.
        window: training passes between two changes of ``dgqa``'s groups.

    The official code repairs dgqa's rounded sizes at random; here as kdgqa does, by the largest and smallest. How
    pgqa's noise is normalised is not said; here each head's [tokens, channels] has the norm 1.
    """

    source: ClassVar[str] = "Key-driven GQA (2024), sections 3.1-3.3; official code"
    verified: ClassVar[str] = "golden (gqa, kdgqa; dgqa at its first groups); pgqa reconstructed"

    def __init__(
        self, encoder: Encoder, groups: int | None = None, grouping: Kind = "kdgqa", window: int = 300
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        model = getattr(encoder, "model", None)
        if not isinstance(model, nn.Module) or not getattr(encoder, "plain", False):
            raise ModelError("model.vision: grouped_vit: expected a plain vision transformer of timm as its encoder")
        group_attention(model, groups, grouping, window)
        self.image, self.dim, self.grid, self.depth = encoder.image, encoder.dim, encoder.grid, encoder.depth
        self.output, self.prefix, self.class_token, self.cuts = (
            encoder.output,
            encoder.prefix,
            encoder.class_token,
            encoder.cuts,
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.encoder.blocks

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        return self.encoder(images)


def group_attention(model: Any, groups: int | None = None, kind: Kind = "kdgqa", window: int = 300) -> None:
    """Replace the attention of every block of a timm ViT by a grouped one with converted weights.

    Raises ModelError for attention of another form, or groups that do not divide the heads.
    """
    for block in model.blocks:
        attention = block.attn
        plain = type(attention) is Attention and all(
            isinstance(getattr(attention, name, None), nn.Identity) for name in ("q_norm", "k_norm", "norm")
        )
        if not plain:
            name = type(attention).__name__
            raise ModelError(f"model.vision: grouped_vit: expected plain attention without norms of q, k; found {name}")
        made = GroupedAttention(
            attention.proj.in_features,
            attention.num_heads,
            groups if groups is not None else attention.num_heads // 2,
            kind,
            window,
            bias=attention.qkv.bias is not None,
            device=attention.qkv.weight.device,
        )
        made.convert(attention)
        block.attn = made.train(attention.training)


class GroupedAttention(nn.Module):
    """Attention of ``heads`` query heads over ``groups`` key/value heads, contiguous query heads to a group.

    Raises ModelError where the groups do not divide the heads.
    """

    sizes: Tensor
    cache: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        kind: Kind = "gqa",
        window: int = 300,
        bias: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ModelError(f"model.vision: grouped_vit: grouping: expected one of {', '.join(KINDS)}; found {kind}")
        if groups < 1 or heads % groups:
            raise ModelError(
                f"model.vision: grouped_vit: expected groups that divide the {heads} heads; found {groups}"
            )
        self.heads, self.groups, self.kind, self.window, self.width = heads, groups, kind, window, dim // heads
        inner: dict[str, Any] = {"bias": bias, "device": device}
        if kind.startswith("dgqa"):
            self.register_buffer("cache", torch.zeros(groups, device=device))
        self.q = nn.Linear(dim, dim, **inner)
        self.k = nn.Linear(dim, groups * self.width, **inner)
        self.v = nn.Linear(dim, groups * self.width, **inner)
        self.proj = nn.Linear(dim, dim, device=device)
        if kind.startswith("dgqa"):  # query heads of each group; published weights do not have them
            self.register_buffer("sizes", torch.full((groups,), heads // groups, dtype=torch.long, device=device))
            self._register_load_state_dict_pre_hook(self._without_sizes)
        self.passes = 0

    def _without_sizes(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Published weights begin with equal groups."""
        state.setdefault(f"{prefix}sizes", torch.full_like(self.sizes, self.heads // self.groups))

    @torch.no_grad()
    def convert(self, attention: Any) -> None:
        """Take the weights of timm's attention; keys and values of a group are the mean of its heads'."""
        for name in ("weight", "bias"):
            joint = getattr(attention.qkv, name)
            if joint is None or joint.device.type == "meta":
                continue
            q, k, v = joint.unflatten(0, (3, self.heads, self.width))  # [H,d,...]
            self.q.get_parameter(name).copy_(q.flatten(0, 1))
            for layer, own in ((self.k, k), (self.v, v)):
                mean = own.unflatten(0, (self.groups, -1)).mean(1)  # [G,d,...]
                layer.get_parameter(name).copy_(mean.flatten(0, 1))
        self.proj = attention.proj

    def forward(
        self, x: Float[Tensor, "n tokens dim"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "n tokens dim"]:
        q, k, v = (
            layer(x).unflatten(2, (count, self.width)).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )  # [N,H or G,T,d]
        owner = self._owner(k)
        out = F.scaled_dot_product_attention(q, k[:, owner], v[:, owner], attn_mask, is_causal=is_causal)
        if self.kind == "pgqa":
            noise = torch.randn_like(out)
            out = out - noise / noise.flatten(2).norm(dim=2)[..., None, None]
        return self.proj(out.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def _owner(self, k: Float[Tensor, "n groups tokens dim"]) -> Int[Tensor, " heads"]:
        """The key/value head that each query head reads."""
        group = torch.arange(self.groups, device=k.device)
        if self.kind in ("gqa", "pgqa") or k.device.type == "meta":
            return group.repeat_interleave(self.heads // self.groups)
        if self.kind == "kdgqa":
            return group.repeat_interleave(shares(key_norms(k), self.heads).to(k.device))
        if self.training:
            self.passes += 1
            if self.passes % self.window == 0:
                norms = key_norms(k)
                change = (norms - self.cache).abs() if self.kind == "dgqa_diff" else 0.9 * norms + 0.1 * self.cache
                self.sizes.copy_(shares(change, self.heads))
                self.cache.copy_((self.cache + norms) / self.window)
        return group.repeat_interleave(self.sizes, output_size=self.heads)


def key_norms(k: Float[Tensor, "n groups tokens dim"]) -> Float[Tensor, " groups"]:
    """The size of each group's keys, summed over the batch and brought to 0..1; all 1 where they are equal."""
    norms = k.float().flatten(2).norm(dim=2).sum(0)
    low, high = norms.min(), norms.max()
    return torch.ones_like(norms) if bool(high == low) else (norms - low) / (high - low)


def shares(importance: Float[Tensor, " groups"], heads: int) -> Int[Tensor, " groups"]:
    """``heads`` query heads divided among groups by importance: rounded, then the largest gives and the smallest takes
    until they add up. Groups of no importance get none; where all have none, they get equally many."""
    total = importance.sum()
    part = importance / total if bool(total > 0) else torch.full_like(importance, 1 / len(importance))
    sizes = (part * heads).round().long()
    while int(sizes.sum()) > heads:
        sizes[sizes.argmax()] -= 1
    while int(sizes.sum()) < heads:
        sizes[sizes.argmin()] += 1
    return sizes
