"""BiFormer's bi-level routing: regions of an image choose regions by their means, all heads together."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.kernels.selectors.blocks import at_least, best, pairs
from vlm.kernels.selectors.order import Order, boxes
from vlm.kernels.sparse.lists import BlockLists

NAME = "biformer"


@torch.no_grad()
def biformer(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    grid: tuple[int, int],
    regions: int = 7,
    topk: int = 4,
) -> tuple[BlockLists, Order]:
    """Zhu et al. 2023, BiFormer: Vision Transformer with Bi-Level Routing Attention, section 3.2.

    The image of ``grid`` = (height, width) tokens is cut into regions x regions. The affinity of two regions is the
    product of their mean query and mean key over all heads together; each region attends to its ``topk`` best ones,
    itself not forced, the same for every head. The lists are for tokens in region order::

        lists, order = biformer(q, k, grid=(56, 56))
        out = block_sparse_attention(
            order.apply(q), order.apply(k), order.apply(v), lists, causal=False, scale=(heads * dim) ** -0.5
        )
        out = order.undo(out)

    The official code scales the attention, too, by the dim of all heads together: pass that ``scale``. Its depthwise
    convolution of v is the layer's matter. Checked against the official code (``TopkRouting``); 7 and 4 are its
    defaults, the published models use more of ``topk`` in deeper stages.

    Raises:
        ValueError: tokens that are not the grid's, a grid that is not a multiple of ``regions``, or ``topk`` below 1.
    """
    at_least(NAME, 1, topk=topk, regions=regions)
    height, width = grid
    if q.shape[2] != height * width or k.shape[2] != height * width:
        raise ValueError(f"{NAME}: grid {grid} has {height * width} tokens; found {q.shape[2]} rows, {k.shape[2]} keys")
    if height % regions or width % regions:
        raise ValueError(f"{NAME}: grid {grid} must be a multiple of regions on both sides; found {regions}")
    order = boxes(NAME, grid, (height // regions, width // regions), q.device)
    tokens = len(order.forward) // regions**2
    p = pairs(NAME, order.apply(q), order.apply(k), tokens, tokens, {"causal": False})
    affinity = torch.einsum("bhid,bhjd->bij", p.query_means(), p.key_means())[:, None]  # [B,1,regions,regions]
    possible = p.possible()
    chosen = best(affinity, topk, torch.zeros_like(possible), possible)
    return p.lists(chosen, each=min(topk, regions**2)), order  # all regions see each other
