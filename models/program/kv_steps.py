"""Which cache entries a decoding step reads, when nothing is evicted."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.kv import top_entries


def read_by(layer: int, focal: tuple[int, ...], step: int) -> tuple[int, int] | None:
    """(layer, step) whose attention chose the visual entries that ``layer`` reads at ``step``; None: it reads all.

    Focal layers read all and choose for the layers after them, up to the next focal layer; layers before the first
    use the last focal layer's choice of the step before, and read all at step 0. Source: FastOCR (arXiv 2605.17447),
    abstract. Reconstructed: nothing but the abstract was known.
    """
    if layer in focal:
        return None
    before = [f for f in focal if f < layer]
    if before:
        return max(before), step
    return (max(focal), step - 1) if step and focal else None


def step_set(
    attention: Float[Tensor, "batch heads keys"], visual: Bool[Tensor, "batch keys"], count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch keys"]:
    """The ``count`` visual entries that a focal layer's row attends to most, mean over heads.

    Source: FastOCR (arXiv 2605.17447), abstract (5 % of them). Reconstructed.
    """
    return top_entries(attention.mean(1, keepdim=True), visual, count)[:, 0]


def is_full_step(step: int, every: int) -> bool:
    """Whether RefreshKV attends to the whole cache at this step; the prompt's own pass is step 0.

    Source: Recycled Attention / RefreshKV (ACL 2025), section 3 (stride 50 on RULER, 10 for language modelling).
    """
    return step % every == 0


def query_moved(
    query: Float[Tensor, "batch heads dim"], at_full_step: Float[Tensor, "batch heads dim"], least: float = 0.8
) -> Bool[Tensor, " batch"]:
    """RefreshKV's dynamic rule: the query is no longer like the one of the last full step (mean cosine of heads).

    Source: RefreshKV (ACL 2025), section 3. Reconstructed: checked every 5 steps there; the mean over heads is ours.
    """
    return torch.nn.functional.cosine_similarity(query.float(), at_full_step.float(), dim=-1).mean(1) < least


def recycled(
    attention: Float[Tensor, "batch heads keys"], valid: Bool[Tensor, "batch keys"], count: int | Int[Tensor, " batch"]
) -> Bool[Tensor, "batch heads keys"]:
    """The entries that the steps until the next full one read: the best of a full step's row, for each head.

    A step in between adds its own entry in the place of the one it attended to least
    (:func:`vlm.models.program.kv.lightest`), so that the set keeps its size. Give attention by key/value head, the
    maximum over its query heads (:func:`vlm.models.program.kv.group_heads`): the paper does not say how.
    Source: RefreshKV (ACL 2025), section 3.
    """
    return top_entries(attention, valid, count)
