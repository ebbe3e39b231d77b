"""Mixture-of-heads attention on TransNeXt: ``vision: {use: moh, variant: base_75}``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.aggregated import (
    VARIANTS,
    AggregatedAttention,
    CosineAttention,
    GlobalCosineAttention,
    Grid,
    TransnextNet,
)
from vlm.models.backbone import BackboneEncoder
from vlm.models.encoder import Auxiliary
from vlm.models.errors import ModelError


class _Routed(CosineAttention):
    """Weights of the heads at each place: ``shared`` heads always count, of the others the ``routed`` likeliest do."""

    shared: int
    routed: int
    ledger: list[Tensor] | None = None  # where the balance of a pass is noted

    def route(self, dim: int, shared: int, routed: int) -> None:
        """Add the routers, by the names that the published code gives them."""
        self.shared, self.routed = (shared, routed) if routed else (self.heads, 0)
        if self.routed:
            self.wg = nn.Linear(dim, self.heads - shared, bias=False)
            if shared:
                self.wg_0 = nn.Linear(dim, 2, bias=False)
        if self.shared > 1:
            self.wg_1 = nn.Linear(dim, self.shared, bias=False)

    def gates(self, x: Float[Tensor, "n places dim"]) -> Float[Tensor, "n places heads"]:
        """The factor of each head at each place, the shared heads first; their sum is shared + routed on average."""
        always = x.new_ones(*x.shape[:2], self.shared)
        if self.shared > 1:
            always = self.wg_1(x).softmax(-1) * self.shared
        if not self.routed:
            return always
        likely = self.wg(x).softmax(-1)  # [N,L,E]
        chosen = torch.zeros_like(likely).scatter(-1, likely.topk(self.routed, -1).indices, 1.0)
        kept = likely * chosen
        sometimes = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps) * self.routed
        if self.ledger is not None and torch.is_grad_enabled():
            mean = likely.mean((0, 1)) * chosen.mean((0, 1))
            self.ledger.append(mean.mean() * likely.shape[-1] ** 2)
        if not self.shared:
            return sometimes
        of_shared, of_routed = (2 * self.wg_0(x).softmax(-1)).chunk(2, -1)
        return torch.cat([of_shared * always, of_routed * sometimes], -1)

    def weigh(self, heads: Float[Tensor, "n heads places width"], x: Float[Tensor, "n places dim"]) -> Tensor:
        return heads * self.gates(x).transpose(1, 2)[..., None].to(heads.dtype)


class RoutedAggregatedAttention(_Routed, AggregatedAttention):
    """Aggregated attention with routed heads."""


class RoutedGlobalAttention(_Routed, GlobalCosineAttention):
    """Global cosine attention with routed heads."""


class MohNet(TransnextNet):
    """TransNeXt with routers.

    Args:
        shared: heads of each stage that always count. routed: of the others, so many count at a place; where it is 0
            all heads of the stage are shared.
        dims, depths, head_dim, drop_path, classes: as in TransNeXt.
    """

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        shared: Sequence[int] = (2, 4, 4, 4),
        routed: Sequence[int] = (0, 0, 2, 6),
        head_dim: int = 24,
        drop_path: float = 0.0,
        classes: int = 1000,
    ) -> None:
        self.shared, self.routed = shared, routed
        super().__init__(dims, depths, head_dim=head_dim, drop_path=drop_path, classes=classes)

    def attention(self, stage: int, dim: int, heads: int, pretrained: Grid) -> nn.Module:
        reduction = self.reductions[stage]
        made = (
            RoutedGlobalAttention(dim, heads, pretrained)
            if reduction is None
            else RoutedAggregatedAttention(dim, heads, pretrained, self.window, reduction)
        )
        made.route(dim, self.shared[stage], self.routed[stage])
        return made

    @contextmanager
    def balancing(self) -> Iterator[list[Tensor]]:
        """Passes inside that record gradients append to the list how unevenly each routed layer used its heads: the
        number of heads routed to where use is even, more where it is not."""
        ledger: list[Tensor] = []
        routed = [module for module in self.modules() if isinstance(module, _Routed)]
        for module in routed:
            module.ledger = ledger
        try:
            yield ledger
        finally:
            for module in routed:
                module.ledger = None


class Moh(BackboneEncoder):
    """MoH-TransNeXt: at each place some heads always count and the router chooses among the others.

    All heads are computed, as in the official code: what a variant's name says is the share of heads that count, no
    speed.

    balance: share of the load-balance loss in training, 0.01 as published, 0 for none. With E heads to choose from, p
    their softmax and m which of them were chosen, a layer's loss is mean_e(mean_n p mean_n m) E^2, the means over the
    places n of a micro-batch; the loss is their mean over the layers that route.
    """

    source: ClassVar[str] = "MoH (ICML 2025), section 3.2; official code"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = MohNet
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base_75": {**VARIANTS["base"], "shared": (4, 8, 4, 5), "routed": (0, 0, 8, 16)},
        "base_50": {**VARIANTS["base"], "shared": (2, 2, 2, 4), "routed": (2, 4, 6, 8)},
        "small_80": {**VARIANTS["small"], "shared": (3, 6, 3, 8), "routed": (0, 0, 6, 12)},
        "small_75": {**VARIANTS["small"], "shared": (3, 6, 3, 4), "routed": (0, 0, 6, 12)},
    }
    normalized: ClassVar[Literal["inner", "all", "none"]] = "none"  # every stage ends in a norm of its own
    blind = "its blocks attend to windows and pooled maps"

    def __init__(
        self,
        variant: str,
        weights: str | None = None,
        layer: int = -2,
        image: int | None = None,
        config: Mapping[str, Any] | None = None,
        balance: float = 0.01,
    ) -> None:
        if not 0 <= balance < float("inf"):
            raise ModelError(f"model.vision.balance: expected a share of 0 or more; found {balance}")
        super().__init__(variant, weights, layer, image, config)

    @contextmanager
    def auxiliary(self) -> Iterator[Mapping[str, Auxiliary]]:
        """The load-balance loss of the passes inside, for whoever trains the encoder."""
        with self.model.balancing() as found:
            share = self.made_with["balance"]
            yield {"balance": Auxiliary(share, found)} if share else {}
