"""A fixed number of visual tokens, whatever the grid, as in Flamingo: ``connector: {use: resampler, queries: 64}``."""

from math import isqrt
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.errors import ModelError
from vlm.models.part import Part


class Resampler(Part):
    """Learned queries gather the vision features by cross-attention and become the visual tokens.

    Flamingo's Perceiver resampler, as wide as the language model: ``depth`` times, the queries attend to the features
    and to themselves, then pass an MLP. A square number of queries is arranged as a square, any other as one row; a
    place in that grid is a number, not a part of the picture.

    Args:
        vision_dim, language_dim: widths, filled in by the composed model.
        queries: visual tokens that an image becomes.
        depth: number of attention layers. heads: attention heads; they divide the width of the language model.
        mlp_ratio: width of the MLP inside, as a multiple of the language model's.
        positions: add sines of row and column to the features' keys (Qwen-VL), for encoders without positions of
            their own.
    """

    source: ClassVar[str] = "Flamingo (NeurIPS 2022), section 3.1; positions: Qwen-VL (arXiv 2308.12966), section 2.1"
    verified: ClassVar[str] = "paper"
    token_wise: ClassVar[bool] = False
    spatial: ClassVar[bool] = False

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        queries: int = 64,
        depth: int = 2,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        positions: bool = False,
    ) -> None:
        super().__init__()
        if min(queries, depth, heads) < 1 or mlp_ratio <= 0:
            found = f"{queries}, {depth}, {heads} and {mlp_ratio:g}"
            raise ModelError(f"model.connector: queries, depth, heads and mlp_ratio must be above 0; found {found}")
        if language_dim % heads or (positions and language_dim % 4):
            wanted = f"{heads} heads" + (" and, for positions, by 4" if positions else "")
            raise ModelError(f"model.connector: expected a width that divides by {wanted}; found {language_dim}")
        self.positions = positions
        self.project = nn.Linear(vision_dim, language_dim)
        self.queries = nn.Parameter(torch.randn(queries, language_dim) * 0.02)
        self.layers = nn.ModuleList(_Layer(language_dim, heads, round(mlp_ratio * language_dim)) for _ in range(depth))
        self.norm = nn.LayerNorm(language_dim)

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The square that the queries fill, or one row; the same for every grid of features."""
        count = len(self.queries)
        side = isqrt(count)
        return (side, side) if side**2 == count else (1, count)

    def forward(
        self, tokens: Float[Tensor, "images tokens vision"], grid: tuple[int, int]
    ) -> Float[Tensor, "images queries language"]:
        features = self.project(tokens)  # [N,P,D]
        places = sines(*grid, features) if self.positions else None
        queries = self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features, places)
        return self.norm(queries)


class _Layer(nn.Module):
    """Attention from the queries to features and queries, then an MLP; both with the norm before them."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_queries, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False)
        )

    def forward(
        self,
        queries: Float[Tensor, "images queries width"],
        features: Float[Tensor, "images tokens width"],
        places: Float[Tensor, "tokens width"] | None,
    ) -> Float[Tensor, "images queries width"]:
        own, seen = self.norm_queries(queries), self.norm_features(features)
        keys = torch.cat([seen if places is None else seen + places, own], 1)  # [N,P+Q,D]
        values = torch.cat([seen, own], 1)
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (self.q(own), self.k(keys), self.v(values))
        )
        queries = queries + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return queries + self.mlp(queries)


def sines(rows: int, cols: int, like: Tensor) -> Float[Tensor, "places width"]:
    """Sines and cosines of row and column in raster order: half of the width for each, wavelengths up to 10,000.

    ``like`` gives width (its last axis, a multiple of 4), type and device.
    """
    quarter = like.shape[-1] // 4
    speed = 10_000.0 ** -(torch.arange(quarter, device=like.device) / quarter)
    angles = [torch.arange(n, device=like.device)[:, None] * speed for n in (rows, cols)]
    down, along = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)  # [rows,D/2], [cols,D/2]
    both = [down[:, None].expand(-1, cols, -1), along[None].expand(rows, -1, -1)]
    return torch.cat(both, 2).flatten(0, 1).to(like.dtype)
