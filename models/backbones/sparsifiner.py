"""Sparsifiner: a DeiT whose every token attends to a quarter of the others, chosen by a cheap guess."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.backbone import BackboneEncoder, init_linear
from vlm.models.encoder import Auxiliary
from vlm.models.errors import ModelError

THRESHOLD = 0.02  # entries of the basis up to it count as 0


class Guess(NamedTuple):
    """What the predictor says of a block's attention: coefficients of the basis, their products, and what is kept."""

    coefficients: Float[Tensor, "n heads patches rank"]
    approximate: Float[Tensor, "n heads patches tokens"]
    mask: Bool[Tensor, "n heads tokens tokens"]


class MaskPredictor(nn.Module):
    """Low-rank guess of a block's attention from its queries and keys, shared by its heads."""

    def __init__(self, tokens: int, width: int, reduce_tokens: int, reduce_width: int, keep: float, basis: int) -> None:
        super().__init__()
        rank = tokens // reduce_tokens
        self.keep, self.basis = math.ceil(keep * tokens), min(basis, rank)
        self.proj_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_back_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_c_q = nn.Linear(width, width // reduce_width)
        self.proj_c_k = nn.Linear(width, width // reduce_width)
        trunc_normal_(self.proj_n, std=0.02)
        trunc_normal_(self.proj_back_n, std=0.02)

    def dense(self, q: Float[Tensor, "n heads tokens width"], k: Float[Tensor, "n heads tokens width"]) -> Tensor:
        """Coefficients of the whole basis, for every token but the class token [n, heads, patches, rank]."""
        few = self.proj_c_k(k).transpose(2, 3) @ self.proj_n  # [N,H,w,rank]
        scores = self.proj_c_q(q)[:, :, 1:] @ few * q.shape[1] ** -0.5  # of the number of heads, as published
        return scores.softmax(-1)

    def forward(self, q: Float[Tensor, "n heads tokens width"], k: Float[Tensor, "n heads tokens width"]) -> Guess:
        coefficients = self.dense(q, k)
        least = coefficients.topk(self.basis, -1).values[..., -1:]
        coefficients = coefficients * (coefficients >= least)
        basis = self.proj_back_n.T.abs()
        approximate = coefficients @ (basis * (basis > THRESHOLD))  # [N,H,T-1,T]
        mask = torch.zeros_like(approximate, dtype=torch.bool)
        mask.scatter_(3, approximate.topk(self.keep, -1).indices, True)
        whole = torch.ones_like(mask[:, :, :1])  # the class token attends to everything
        return Guess(coefficients, approximate, torch.cat([whole, mask], 2))


class SparseAttention(nn.Module):
    """Multi-head attention of each token to the tokens that its guess keeps. The mask has no gradient.

    It is a mask on dense attention, as in the official code: fewer pairs count, no time is saved.
    """

    ledger: list[Tensor] | None = None  # where a pass that trains the predictor notes how far off it is

    def __init__(self, dim: int, heads: int, tokens: int, **predictor: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mask_predictor = MaskPredictor(tokens, dim // heads, **predictor)

    def split(self, x: Float[Tensor, "n tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [N,H,T,d]."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        q, k, v = self.split(x)
        if self.ledger is None or not torch.is_grad_enabled():
            out = F.scaled_dot_product_attention(q, k, v, self.mask_predictor(q, k).mask)
        else:
            attention = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
            guess = self.mask_predictor.dense(q, k) @ self.mask_predictor.proj_back_n.T  # [N,H,T-1,T]
            self.ledger.append((guess - attention[:, :, 1:].detach()).square().sum() / len(x))
            out = attention @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, tokens: int, **predictor: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SparseAttention(dim, heads, tokens, **predictor)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """size: side of an image in pixels, which the predictors depend on. keep: share of keys that a token attends to.

    reduce_tokens, reduce_width: how much smaller the guess is than the attention. basis: coefficients kept of a row.
    """

    prefix = 1

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int = 12,
        patch: int = 16,
        size: int = 224,
        classes: int = 1000,
        keep: float = 0.25,
        reduce_tokens: int = 6,
        reduce_width: int = 2,
        basis: int = 8,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ModelError(f"model.vision: sparsifiner: expected a size of multiples of {patch} pixels; found {size}")
        self.size, self.stages, self.side = size, depth, size // patch
        tokens = self.side**2 + 1
        predictor = {"reduce_tokens": reduce_tokens, "reduce_width": reduce_width, "keep": keep, "basis": basis}
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.patch_embed = PatchEmbed(size, patch, 3, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, tokens, **predictor) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        self.apply(init_linear)
        for lone in (self.cls_token, self.pos_embed):
            trunc_normal_(lone, std=0.02)

    def tokens(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[Float[Tensor, "n tokens dim"]]:
        """What leaves each block, class token first; the last with the norm."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for number, block in enumerate(self.blocks):
            x = block(x)
            yield self.norm(x) if number == self.stages - 1 else x

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> Iterator[tuple[Tensor, Tensor]]:
        for x in self.tokens(images):
            yield x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        *_, last = self.tokens(images)
        return self.head(last[:, 0])


class Sparsifiner(BackboneEncoder):
    """DeiT-S or -B with predicted sparse attention, a quarter of the keys for each token.

    Its predictors know the number of tokens, so pictures have one size: the published 224 pixels, or ``config: {size:
    ...}`` beside ``image`` for weights of one's own.

    reconstruct: share of the predictors' loss in training, for the first phase of the published recipe; 0 for none, and
    then they stay as they are, for a mask has no gradient. A layer's loss is the squared difference between its
    attention without a mask and the guess with the whole basis, summed over heads and pairs, for a picture; the loss is
    the mean over layers. While it counts, nothing is masked, as published. The target is the network's own attention
    (of the dense DeiT that its weights begin with, the authors' teacher; their code has its own attention too), and
    their 0.01 for the sum over 168 pictures is 1.68 here.
    """

    source: ClassVar[str] = "Sparsifiner (CVPR 2023), section 3; official code"
    verified: ClassVar[str] = "golden; published keys"

    network = Network
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "s": {"dim": 384, "heads": 6},
        "b": {"dim": 768, "heads": 12},
    }
    smallest = 16
    blind = "its attention is masked by a predictor"
    cuts = "its mask predictor knows every token by its place"

    def __init__(
        self,
        variant: str,
        weights: str | None = None,
        layer: int = -2,
        image: int | None = None,
        config: Mapping[str, Any] | None = None,
        reconstruct: float = 0.0,
    ) -> None:
        if not 0 <= reconstruct < float("inf"):
            raise ModelError(f"model.vision.reconstruct: expected a share of 0 or more; found {reconstruct}")
        super().__init__(variant, weights, layer, image, config)

    @contextmanager
    def auxiliary(self) -> Iterator[Mapping[str, Auxiliary]]:
        """How far the predictors of the passes inside are from the attention, for whoever trains the encoder."""
        share, found = self.made_with["reconstruct"], []
        layers = [module for module in self.modules() if share and isinstance(module, SparseAttention)]
        for layer in layers:
            layer.ledger = found
        try:
            yield {"reconstruction": Auxiliary(share, found)} if share else {}
        finally:
            for layer in layers:
                layer.ledger = None

    def _check(self, images: Tensor) -> None:
        size = self.model.size
        if tuple(images.shape[2:]) != (size, size):
            raise ModelError(
                f"model.vision: sparsifiner: expected images of {size} x {size} pixels, as image and config.size say; "
                f"found {images.shape[2]} x {images.shape[3]}"
            )
