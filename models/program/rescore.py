"""Maps of the newest row's attention: scores before the softmax, weights after it; the catalogue of PAI's relatives.

All take [batch, heads, keys] in single precision or more. A score of -inf hides a key and stays so. A row without an
image is left as it is.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.program import Keys, Program, Rescore, attn
from vlm.models.program.signals import Facts, Signal

Map = Callable[[Float[Tensor, "batch heads keys"], Keys], Float[Tensor, "batch heads keys"]]


def share(facts: Facts, who: str, layers: tuple[int, int] | None, first: int, last: int, depth: int = 32) -> range:
    """The decoder layers from the first to the last given. Without any, those that lie where ``first`` and ``last`` lie
    in the ``depth`` layers that a method was published for.

    Raises ModelError for layers that do not exist.
    """
    if layers is None:
        at = lambda layer: round(layer * (facts.layers - 1) / (depth - 1))  # noqa: E731
        return range(at(first), at(last) + 1)
    if not 0 <= layers[0] <= layers[1] < facts.layers:
        found = f"{layers[0]}, {layers[1]}"
        raise ModelError(f"{who}.layers: expected first and last of 0..{facts.layers - 1}; found {found}")
    return range(layers[0], layers[1] + 1)


def from_second(facts: Facts, who: str, layers: tuple[int, int] | None) -> range:
    """The decoder layers given; without any, all but the first two. Raises ModelError as :func:`share`."""
    return range(min(2, facts.layers), facts.layers) if layers is None else share(facts, who, layers, 0, 0)


def rescore(layers: range, scores: Map, *needs: Signal) -> Program:
    """The program that maps the newest row's scores in every one of some layers."""
    return tuple((attn(layer), Rescore(scores=scores, needs=needs)) for layer in layers)


def raised(
    scores: Float[Tensor, "batch heads keys"], by: Float[Tensor, "batch #heads keys"]
) -> Float[Tensor, "batch heads keys"]:
    """``z + by |z|``: PAI (ECCV 2024), section 3.2. ``by`` is 0 where nothing changes."""
    size = scores.nan_to_num(neginf=0.0).abs()  # nothing is added to a hidden key's score
    return torch.addcmul(scores, by.to(scores.dtype), size)


def raised_together(
    scores: Float[Tensor, "batch heads keys"], by: float, keys: Bool[Tensor, "batch keys"]
) -> Float[Tensor, "batch heads keys"]:
    """``z + by mean over heads |z|`` at ``keys``, the same in every head: HGAI (CVPR 2025), section 4."""
    mean = scores.nan_to_num(neginf=0.0).abs().mean(1, keepdim=True)
    return torch.addcmul(scores, mean, by * keys[:, None].to(scores.dtype))
