"""Block-sparse attention: each block of rows attends to the blocks of keys in its list.

    row i sees key j  iff  the list of i's block names j's block  and  causality, padding, documents let it

The lists come from a selector (:mod:`vlm.kernels.selectors`) or from anyone who makes a
:class:`~vlm.kernels.sparse.lists.BlockLists`.
"""

from typing import Literal, Unpack, overload

from jaxtyping import Float
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dispatch import Implementation, lazy
from vlm.kernels.sparse.gather import block_sparse_torch
from vlm.kernels.sparse.lists import BlockLists, check
from vlm.kernels.sparse.reference import block_sparse_reference
from vlm.kernels.visibility import Common, operands

NAME = "block_sparse_attention"
IMPLEMENTATIONS = (
    Implementation(
        "flex", lazy("vlm.kernels.sparse.flex", "block_sparse_flex"), dispatch.needs_flex, dispatch.slow_on_cpu
    ),
    Implementation("torch", block_sparse_torch),
    Implementation("reference", block_sparse_reference),
)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    return_lse: Literal[False] = False,
    impl: str = "auto",
    **common: Unpack[Common],
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    return_lse: bool,
    impl: str = "auto",
    **common: Unpack[Common],
) -> Tensor | tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    lists: BlockLists,
    *,
    return_lse: bool = False,
    impl: str = "auto",
    **common: Unpack[Common],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over listed blocks.

    Args:
        lists: for all samples and heads or for each; their last blocks may reach past the rows and keys.
        return_lse: also return the log-sum-exp.
        impl: ``"flex"`` skips what is not listed on a GPU (in tiles of 128); ``"torch"`` computes the listed blocks
            only, on any device; ``"reference"`` is dense with a mask and the definition.
        **common: see :class:`~vlm.kernels.visibility.Common`.

    Returns:
        [batch, heads, rows, value_dim] of the type of v; with ``return_lse`` also the natural log-sum-exp
        [batch, heads, rows] in fp32 (fp64 for fp64 inputs). A row that sees no key gives 0 and -inf.

    Raises:
        ValueError: shapes, types or devices that do not fit, lists that do not fit or are not ascending and unique,
            or an ``impl`` that cannot run here.
    """
    x = operands(NAME, q, k, v, common)
    check(NAME, lists, q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device, common.get("validate", True))
    chosen = dispatch.choose(NAME, IMPLEMENTATIONS, impl, dispatch.Call.of(q, k, v))
    out, lse = chosen.run(x, lists)
    return (out, lse) if return_lse else out


def explain(call: dispatch.Call) -> dispatch.Choice:
    """Which implementation ``impl="auto"`` takes for a call, and why not the others."""
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)
