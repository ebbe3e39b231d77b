"""How many cache entries each layer and each head gets."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.budget import Budget
from vlm.models.program.quota import divide
from vlm.models.program.segments import ranks


def window_in(capacity: Int[Tensor, " batch"], most: int) -> Int[Tensor, " batch"]:
    """How many of ``capacity`` entries a policy keeps for where they stand (recent ones, sinks): ``most``, but at most
    half of them and, unless ``most`` is 0, at least one.

    The one rule of all policies here. Published codes need a capacity above their window, or set the window to
    ``capacity - 2`` (GUI-KV); at the budgets they report, both say the same.
    """
    return (capacity // 2).clamp(min=min(most, 1), max=most)


class Window(NamedTuple):
    """The last rows of a prompt that observe and whose entries stay: :func:`window_in` of what ``keep`` allows."""

    most: int
    keep: Budget

    def of(self, prompt: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Rows of the window of prompts with so many entries."""
        return window_in(self.keep.count(prompt, torch.ones_like(prompt)), self.most)


def pyramid(capacity: int, window: int, length: int, layers: int, slope: int = 20) -> list[int]:
    """Entries of each layer, the ``window`` among them: falling linearly, ``capacity`` on average.

    The last layer's share before the window is the mean divided by ``slope``. Steps are whole numbers, rounded down
    from the first layer on, which gives up to ``(layers - 1) / 2`` entries a layer more than the mean. A prompt shorter
    than twice the mean gets ``capacity`` everywhere, and one not longer than that stays whole.
    Source: PyramidKV (arXiv 2406.02069), section 4.2 and official code.
    """
    if length <= capacity:
        return [length] * layers
    mean = capacity - window
    if length < 2 * mean or layers == 1:
        return [capacity] * layers
    least = mean // slope
    most = 2 * mean - least
    if most >= length - window:
        most = length - window
        least = 2 * mean - most
    step = (most - least) // (layers - 1)
    return [most - layer * step + window for layer in range(layers)]


def attention_density(
    attention: Float[Tensor, "batch heads rows keys"], visible: Bool[Tensor, "batch rows keys"], least: float = 0.01
) -> Float[Tensor, " batch"]:
    """Share of the visible entries that get at least ``least`` of their row's largest attention, mean over heads.

    rows: those after the image. Source: VL-Cache (arXiv 2410.23317), section 4.1 (one minus its sparsity); port.
    """
    wide = attention.masked_fill(~visible[:, None], 0)
    dense = (wide >= least * wide.amax(3, keepdim=True)) & visible[:, None]
    return dense.sum((2, 3)).float().mean(1) / visible.sum((1, 2)).clamp_min(1)


def shares_by_density(
    density: Sequence[float], ratio: float, least: float = 0.01, most: float = 1.0, scale: float = 1.0
) -> list[float]:
    """Share of the prompt that each layer keeps, by its density and ``ratio`` on average, from ``least`` to ``most``.

    scale: 0.9 where a window is kept besides. What a clamp takes or gives is not made up for, as in the port.
    Source: VL-Cache (arXiv 2410.23317), section 4.1; port in EffiVLM-Bench.
    """
    density = density if sum(density) > 0 else [1.0] * len(density)
    whole = sum(density)
    return [min(max(d / whole * ratio * len(density), least), most) * scale for d in density]


def head_counts(
    score: Float[Tensor, "batch heads keys"],
    valid: Bool[Tensor, "batch keys"],
    base: int | Int[Tensor, " batch"],
    floor: float = 0.2,
    normalise: bool = True,
) -> Int[Tensor, "batch heads"]:
    """Entries of each head: the best ``heads * base`` of all heads together are counted, ``base`` on average.

    floor: every head gets ``floor * base`` before the rest is divided by that count. normalise: weigh a head's scores
    by the share of its mass that its best ``base`` entries hold. The published code rounds each head for itself; here
    the counts add up to ``heads * base``, or to all entries there are.
    Source: AdaKV (arXiv 2407.11550), section 3; normalisation read in a port.
    """
    heads = score.shape[1]
    n = valid.sum(1)
    base = torch.as_tensor(base, device=score.device).expand(len(n))
    wide = valid[:, None].expand_as(score)
    score = score.masked_fill(~wide, 0)
    if normalise:
        rank = ranks(score.flatten(0, 1), wide.flatten(0, 1)).unflatten(0, (-1, heads))
        held = (score * (rank < base[:, None, None])).sum(2, keepdim=True)
        score = score * held / score.sum(2, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
    rank = ranks(score.flatten(1), wide.flatten(1)).unflatten(1, (heads, -1))
    count = ((rank < heads * base[:, None, None]) & wide).sum(2)
    rows = zip(count.tolist(), n.tolist(), base.tolist(), strict=True)
    return count.new_tensor([_with_floor(*row, floor) for row in rows]).reshape(count.shape)


def _with_floor(count: list[int], limit: int, base: int, floor: float) -> list[int]:
    wish = [c * (1 - floor) + floor * base for c in count]
    return divide(base * len(count), wish, [limit] * len(count))


def query_similarity(
    query: Float[Tensor, "batch heads rows dim"], real: Bool[Tensor, "batch rows"] | None = None
) -> Float[Tensor, " batch"]:
    """Mean cosine between the last queries of a layer, over pairs and heads. TAPPA takes 32 rows after the rotation.

    real: which rows are there; a single row has no pairs and gives 0. High: what the layer looks at hardly moves from
    row to row. Source: TAPPA (ICLR 2026), section 4.
    """
    unit = torch.nn.functional.normalize(query.float(), dim=-1)
    rows = torch.full((len(query),), query.shape[2], device=query.device)
    if real is not None:
        unit, rows = unit * real[:, None, :, None], real.sum(1)
    pairs = (unit @ unit.transpose(2, 3)).sum((2, 3)) - unit.square().sum((2, 3))  # [B,H]
    return (pairs / (rows * (rows - 1)).clamp_min(1)[:, None]).mean(1)


def preferred(preference: Sequence[float], total: int, length: int | Sequence[int]) -> list[int]:
    """Entries of each layer by ``preference`` (TAPPA: one minus its query similarity), none above its ``length``.

    Shares are rounded down; what is left over or clipped is divided evenly among the layers with room, again and again
    until all is given (the published code does so once, and can exceed the limit). Source: TAPPA (ICLR 2026), 5.1.
    """
    lengths = [length] * len(preference) if isinstance(length, int) else length
    whole = sum(preference)
    first = [min(int(total * p / whole), n) for p, n in zip(preference, lengths, strict=True)]
    more = divide(total - sum(first), [1.0] * len(first), [n - m for n, m in zip(lengths, first, strict=True)])
    return [a + b for a, b in zip(first, more, strict=True)]


def window_statistics(
    total: Float[Tensor, "batch heads keys"],
    squares: Float[Tensor, "batch heads keys"],
    rows: Int[Tensor, " batch"],
    weight: float = 200.0,
) -> Float[Tensor, "batch heads keys"]:
    """Mean plus ``weight`` times the variance of what each entry gets from the window's rows.

    total, squares: sums over the ``rows`` of the window of what they paid, and of its square. Unbiased variance, 0 for
    a single row. Source: TAPPA's eviction score (ICLR 2026), after CAKE (ICLR 2025). Unverified: the bias.
    """
    n = rows[:, None, None].to(total.dtype)
    variance = (squares - total.square() / n) / (n - 1).clamp_min(1)
    return total / n + weight * variance.clamp_min(0)


def whole_heads(layer: int, layers: int, heads: int, share: float = 0.25, least: int = 4) -> int:
    """Heads of a layer that keep everything: ``share`` of them in the first layer, falling to ``least`` in the last.

    Source: Task-KV (arXiv 2501.15113), section 3.2: 0.25 and 4 for Llama-2-7B, 0.3 and 1 for Mistral-7B. Where the
    share of few heads is less than ``least``, it counts in every layer.
    """
    first = heads * share
    return int(first - max(first - least, 0) / max(layers - 1, 1) * layer)


def gain_order(change: Sequence[float], similarity: Sequence[float], weight: float = 0.2) -> list[int]:
    """Layers in the order in which they can be left out: little change to the state and stable queries first.

    change: one minus the cosine of a layer's input and output; similarity: its query similarity; both are rescaled
    to [0, 1] over layers. Source: TAPPA (ICLR 2026), layer pruning (weight 0.1 to 0.3).
    """

    def rescaled(values: Sequence[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(v - low) / (high - low) if high > low else 0.0 for v in values]

    score = [c + weight * (1 - s) for c, s in zip(rescaled(change), rescaled(similarity), strict=True)]
    return sorted(range(len(score)), key=lambda layer: score[layer])
