"""DependencyViT: attention read backwards: tokens send messages, and weak senders fall silent."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import LayerScale, Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from vlm.models.backbone import BackboneEncoder, init_linear
from vlm.models.errors import ModelError

TEMPERATURE = 0.1  # of the softmax over heads
PRUNED = (1, 4, 7, 10)  # blocks after whose attention Lite drops tokens
STEP = 0.16  # share of all tokens that each of them drops


class Messages(NamedTuple):
    """What attention leaves: the tokens' update, what is left of each token's voice, and how much each was sent."""

    out: Float[Tensor, "n tokens dim"]
    voice: Float[Tensor, "n tokens"]
    received: Float[Tensor, "n tokens"]


class _Controller(nn.Module):
    """How much of a token's voice a layer leaves, 0..1; ``bias``: start of a bias, none by default."""

    def __init__(self, dim: int, bias: float | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 2, bias=False)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim // 2, 1, bias=bias is not None)
        self.bias = bias

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens"]:
        return self.fc2(self.act(self.fc1(x))).squeeze(2).sigmoid()


class ReversedAttention(nn.Module):
    """Each token divides one message of its own among all tokens, instead of gathering one from them.

    ``A[j, i]`` is ordinary attention of sender j over receivers i. A sender chooses heads by a softmax, and its voice
    is a product over layers of what the controllers leave.
    """

    def __init__(self, dim: int, heads: int, controller_bias: float | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.head_selector = nn.Linear(dim, heads, bias=False)
        self.message_controller = _Controller(dim, controller_bias)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "n tokens dim"], voice: Float[Tensor, "n tokens"]) -> Messages:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [N,H,T,d]
        attention = (q @ k.transpose(2, 3) * self.scale).softmax(-1)  # [N,H,sender,receiver]
        voice = voice * self.message_controller(x)
        chosen = (self.head_selector(x) / TEMPERATURE).softmax(-1).transpose(1, 2)  # [N,H,T]
        sent = chosen * voice[:, None]
        backward = attention.transpose(2, 3)
        out = backward @ (v * sent[..., None])
        received = (backward @ sent[..., None]).squeeze(3).sum(1)
        return Messages(self.proj(out.transpose(1, 2).flatten(2)), voice, received)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, controller_bias: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReversedAttention(dim, heads, controller_bias)
        self.ls1 = LayerScale(dim, 1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim, 1e-6)


class State(NamedTuple):
    """Tokens after a block, their voices, and the raster places of those that are left."""

    tokens: Float[Tensor, "n tokens dim"]
    voice: Float[Tensor, "n tokens"]
    place: Any  # Int[Tensor, "n tokens"]


class Network(nn.Module):
    """size: side of an image in pixels, of which the positions depend. lite: drop tokens inside.

    controller_bias: start of a bias of the message controllers (4 would leave most of every voice at first). The
    published structure has none: voices begin at about 0.5 ** depth, and gradients with them.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 12,
        depth: int = 12,
        patch: int = 16,
        size: int = 224,
        classes: int = 1000,
        lite: bool = False,
        controller_bias: float | None = None,
    ) -> None:
        super().__init__()
        if size % patch:
            message = f"expected a size of multiples of {patch} pixels; found {size}"
            raise ModelError(f"model.vision: dependencyvit: {message}")
        self.stages, self.size, self.side = depth, size, size // patch
        self.cut: Sequence[int] = tuple(n for n in PRUNED if n < depth) if lite else ()
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, dim))
        self.patch_embed = PatchEmbed(size, patch, 3, dim)
        self.blocks: Any = nn.ModuleList(Block(dim, heads, controller_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, _Controller) and module.bias is not None:
                nn.init.constant_(module.fc2.bias, module.bias)

    def states(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[State]:
        """What leaves each block; the last with the norm, times the voices."""
        x = self.patch_embed(images) + self.pos_embed
        voice = x.new_ones(x.shape[:2])
        place = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for number, block in enumerate(self.blocks):
            said = block.attn(block.norm1(x), voice)
            x, voice = x + block.ls1(said.out), said.voice
            if number in self.cut:
                stay = self._heard(said.received, self.cut.index(number) + 1)  # [N,kept]
                x, voice, place = (_take(one, stay) for one in (x, voice, place))
            x = x + block.ls2(block.mlp(block.norm2(x)))
            yield State(self.norm(x) * voice[..., None] if number == self.stages - 1 else x, voice, place)

    @staticmethod
    def _heard(received: Float[Tensor, "n tokens"], time: int) -> Tensor:
        """Places of the tokens that were sent most, in their order; ``time`` counts the cuts from 1."""
        share = (1 - STEP * time) / (1 - STEP * (time - 1))
        count = int(share * received.shape[1])
        return received.topk(count, 1).indices.sort(1).values

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n dim rows cols"]]:
        for state in self.states(images):
            left = state.tokens.shape[1]
            shape = (self.side, self.side) if left == self.side**2 else (1, left)
            yield state.tokens.transpose(1, 2).unflatten(2, shape)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.states(images)
        return self.head(last.tokens.mean(1))


def _take(x: Tensor, place: Tensor) -> Tensor:
    return x.take_along_dim(place.reshape(*place.shape, *(1,) * (x.ndim - 2)), 1)


class Dependencyvit(BackboneEncoder):
    """DependencyViT-T and -S, and -Lite, which drops the tokens that are sent least on the way.

    The authors published no code and no weights; this is the structure of a re-implementation (timm pull request 2062).
    Positions are of one size of pictures: 224 pixels, or ``config: {size: ...}`` beside ``image``.
    """

    source: ClassVar[str] = "DependencyViT (CVPR 2023), section 3; structure of timm PR 2062, a third party's"
    verified: ClassVar[str] = "reconstructed; a third party's structure, nothing published to compare with"

    network = Network
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"dim": 192},
        "small": {"dim": 384},
        "lite_tiny": {"dim": 192, "lite": True},
        "lite_small": {"dim": 384, "lite": True},
    }
    smallest = 16
    blind = "its attention is read backwards"
    cuts = "its tokens have a voice that the blocks keep"

    @property
    def spatial(self) -> bool:
        """Lite's tokens are those that are left, in no grid, where some were dropped before the layer."""
        return not any(number <= self.output for number in self.model.cut)

    def _check(self, images: Tensor) -> None:
        size = self.model.size
        if tuple(images.shape[2:]) != (size, size):
            raise ModelError(
                f"model.vision: dependencyvit: expected images of {size} x {size} pixels (image and config.size); "
                f"found {images.shape[2]} x {images.shape[3]}"
            )
