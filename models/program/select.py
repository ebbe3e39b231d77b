"""The catalogue that pruners are made of: scores and selectors, small pure functions.

Every choice is per segment and independent of padding and of the other segments. Ties go to the earlier token.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.program import Received, Selector, Tokens


def top(
    score: Float[Tensor, "segments tokens"], valid: Bool[Tensor, "segments tokens"], count: Int[Tensor, " segments"]
) -> Bool[Tensor, "segments tokens"]:
    """Mark the ``count[s]`` valid tokens of largest score in each segment, the earlier one of a tie."""
    score = score.masked_fill(~valid, float("-inf"))
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # rank of each token in its segment
    return (rank < count[:, None]) & valid


def attention_from_last_row(layer: int) -> Selector:
    """The tokens that the last row of decoder layer ``layer`` attends to most (mean over heads)."""
    signal = Received(layer)
    return Selector(lambda tokens, count: top(tokens.signal(signal), tokens.valid, count), (signal,))


def uniform_random(seed: int) -> Selector:
    """A uniformly random subset, drawn anew for each segment from ``seed`` and the segment's pixels."""

    def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
        score = torch.zeros(tokens.valid.shape)
        for s, pixels in enumerate(tokens.seed.tolist()):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + pixels) % 2**63)
            own = int(tokens.valid[s].sum())  # as many draws as tokens: padding must not shift the stream
            score[s, tokens.valid[s].cpu()] = torch.rand(own, generator=generator)
        return top(score.to(tokens.x.device), tokens.valid, count)

    return Selector(choose)


def even_stride() -> Selector:
    """Tokens at even distances: of n tokens, number floor((i + 1/2) n / count) for i < count."""

    def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
        total, wanted = tokens.valid.sum(1, keepdim=True), count[:, None]  # [S,1]
        step = torch.arange(int(count.max()), device=count.device)
        number = ((2 * step + 1) * total).div(2 * wanted.clamp_min(1), rounding_mode="floor")  # [S,C], exact
        spare = tokens.valid.shape[1]  # a column for the steps beyond a segment's own count
        column = torch.where(step < wanted, number, spare)
        hit = tokens.valid.new_zeros(len(count), spare + 1).scatter(1, column, True)
        order = (tokens.valid.long().cumsum(1) - 1).clamp_min(0)  # number of each token among the valid ones
        return hit.gather(1, order) & tokens.valid

    return Selector(choose)


def max_min_order(
    x: Float[Tensor, "segments tokens width"], valid: Bool[Tensor, "segments tokens"], picks: int
) -> Int[Tensor, "segments picks"]:
    """Greedy max-min diversity over cosine distance: the order in which tokens are picked.

    The first pick is the token farthest from its nearest other token; each next one is farthest from its
    nearest pick. Source: DivPrune (CVPR 2025), algorithm 1. O(tokens * picks).
    """
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)  # [S,P,P]
    same = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    nearest = distance.masked_fill(same | ~valid[:, None, :], float("inf")).amin(2)  # to another token
    nearest = nearest.masked_fill(~valid, float("-inf"))
    order = []
    for step in range(picks):
        pick = nearest.argmax(1, keepdim=True)  # [S,1]
        order.append(pick)
        to_pick = distance.gather(2, pick[:, None, :].expand(-1, x.shape[1], -1)).squeeze(2)  # [S,P]
        nearest = to_pick.masked_fill(~valid, float("-inf")) if step == 0 else nearest.minimum(to_pick)
        nearest = nearest.scatter(1, pick, float("-inf"))  # and so it stays: never pick a token twice
    return torch.cat(order, 1)


def max_min_diversity() -> Selector:
    """The most diverse subset in the greedy max-min sense (DivPrune)."""

    def choose(tokens: Tokens, count: Int[Tensor, " segments"]) -> Bool[Tensor, "segments tokens"]:
        order = max_min_order(tokens.x, tokens.valid, int(count.max()))
        wanted = torch.arange(order.shape[1], device=order.device) < count[:, None]
        # a segment with fewer tokens than picks repeats one of them beyond its own count, hence the sum
        picked = torch.zeros_like(tokens.valid, dtype=torch.long).scatter_add(1, order, wanted.long())
        return (picked > 0) & tokens.valid

    return Selector(choose)
