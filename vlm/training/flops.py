"""Floating-point operations of training, counted from what the model works on: pruned tokens and padding are none.

One forward pass, with n real tokens in a layer (after every cut before it), P weights of its matrices and H d heads
times head width: ``2 P n`` for the matrices, and ``2 H d sum(n_s^2)`` for causal attention over samples of n_s tokens
(the half of the square that is computed; ``4 D T^2`` for a block of an encoder over T tokens of width D). The head
counts only the places that go through it. Training adds for the backward pass ``2 P n`` wherever a gradient goes
through to an earlier weight and ``2 P' n`` for the P' weights that train; attention twice its forward. A frozen encoder
so costs its forward pass alone. What activation checkpointing computes again is not counted (this is model FLOPs
utilization, PaLM, 2022, appendix B, with frozen parts and causality seen). Left out: embeddings, norms, patch stems,
scoring of pruners, and attention inside encoders that pack their pictures into one row (Qwen). A layer of experts
counts as if all of them worked.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlm.models.base import BaseVlm
from vlm.models.program.layout import Layout
from vlm.training.sharding import blocks_of


class Cost:
    """Matrix weights of a part of the model, and FLOPs per token that they cost; ``flows``: gradients pass through."""

    def __init__(self, parameters: Iterable[nn.Parameter], flows: bool) -> None:
        weights = [p for p in parameters if p.ndim > 1]
        self.weights = sum(p.numel() for p in weights)
        self.trained = sum(p.numel() for p in weights if p.requires_grad)
        self.forward = 2.0 * self.weights
        self.total = self.forward * (2 if flows else 1) + 2.0 * self.trained
        self.attention = 3.0 if flows else 1.0

    def per_token(self) -> float:
        return self.total if torch.is_grad_enabled() else self.forward

    def per_score(self) -> float:
        return self.attention if torch.is_grad_enabled() else 1.0


class FlopMeter:
    """Counts while it is attached to a model; ``take`` gives what has come together since and begins anew.

    flops: of this rank. real, padded: tokens at the decoder's entry, visual ones after cuts, without and with padding.
    """

    def __init__(self, model: BaseVlm) -> None:
        self.model = model
        self.flops: Any = 0.0  # a tensor on the device once the decoder ran: nothing waits for it
        self.real: Any = 0
        self.padded = 0
        trains = {role: any(p.requires_grad for p in part.parameters()) for role, part in model.parts.items()}
        config: Any = model.decoder.config
        heads = config.num_attention_heads
        self.attention = 2.0 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        language = any(trains.values())
        self.layers = [Cost(layer.parameters(), language) for layer in model.decoder.layers]
        self.head = Cost(model.head.parameters(), language)
        self._handles: list[Any] = []
        self._attach(trains)

    def _attach(self, trains: dict[str, bool]) -> None:
        model: Any = self.model
        decode = model._decode

        def counted(embeds: Tensor, run: Any, cache: Any) -> Any:
            hidden = decode(embeds, run, cache)
            self._count_decoder(run.layouts, torch.is_grad_enabled())
            return hidden

        model._decode = counted
        self._hook(model.head, self._rows(self.head))
        vision = [module for _, module in model.parts["vision"].named_modules()]
        for block in blocks_of(vision):
            self._hook(block, self._block(Cost(block.parameters(), trains["vision"])))
        for _, module in model.parts["connector"].named_modules():
            if isinstance(module, nn.Linear):
                self._hook(module, self._rows(Cost(module.parameters(), trains["vision"])))

    def _hook(self, module: nn.Module, count: Callable[[Tensor], float]) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            seen = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            # Inside a backward pass it is a checkpointed block that is computed again.
            if isinstance(seen, Tensor) and torch._C._current_graph_task_id() == -1:
                self.flops = self.flops + count(seen)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _rows(self, cost: Cost) -> Callable[[Tensor], float]:
        return lambda seen: cost.per_token() * (seen.numel() // seen.shape[-1])

    def _block(self, cost: Cost) -> Callable[[Tensor], float]:
        """An encoder's block over [images, tokens, width], [tokens, width] or [images, channels, height, width]."""

        def count(seen: Tensor) -> float:
            if seen.ndim == 4:
                return cost.per_token() * seen.numel() / seen.shape[1]
            flops = cost.per_token() * (seen.numel() // seen.shape[-1])
            if seen.ndim == 3:
                flops += cost.per_score() * 4.0 * seen.shape[0] * seen.shape[1] ** 2 * seen.shape[2]
            return flops

        return count

    @torch.no_grad()
    def _count_decoder(self, layouts: dict[int, Layout], grad: bool) -> None:
        firsts = [*sorted(layouts), len(self.layers)]
        for first, following in pairwise(firsts):
            lengths = lengths_of(layouts[first])
            tokens, squares = lengths.sum(), (lengths * lengths).sum()
            costs = self.layers[first:following]
            per_token = sum(cost.total if grad else cost.forward for cost in costs)
            per_score = sum(cost.attention if grad else 1.0 for cost in costs)
            self.flops = self.flops + per_token * tokens + per_score * self.attention * squares
            if first == 0:
                self.real = self.real + tokens
                self.padded += layouts[0].role.numel()

    def take(self) -> tuple[float, float, float]:
        """FLOPs, real tokens and tokens with padding of this rank since the last call."""
        found = float(self.flops), float(self.real), float(self.padded)
        self.flops, self.real, self.padded = 0.0, 0, 0
        return found

    def detach(self) -> None:
        """Leave the model as it was."""
        vars(self.model).pop("_decode", None)
        for handle in self._handles:
            handle.remove()


def lengths_of(layout: Layout) -> Tensor:
    """Real tokens of each sample [batch * length], in float64, zeros after the last one; packs hold several samples."""
    sample = layout.sample.clamp_min(0).flatten()
    counts = torch.zeros(sample.numel(), dtype=torch.float64, device=sample.device)
    return counts.scatter_add(0, sample, layout.valid.flatten().double())
