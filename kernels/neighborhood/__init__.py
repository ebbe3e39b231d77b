"""Neighborhood attention in 1 to 3 dimensions: each token of a grid attends to the window around it.

Neighborhood attention (NAT; Hassani et al., CVPR 2023), dilated (DiNAT; Hassani and Shi, 2022), strided and blocked
(generalized; Hassani et al., 2025), causal by axis, with the relative position bias that NATTEN had until 0.17, with
windows clipped at the border (TransNeXt; Shi, CVPR 2024) and with keys that every query sees (a class token,
registers, pooled tokens). What a window is: :mod:`vlm.kernels.neighborhood.window`.
"""

from typing import Literal, Unpack, overload

from jaxtyping import Float, Int
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dispatch import Call, Choice, Implementation, lazy
from vlm.kernels.neighborhood.aggregate import neighborhood_aggregate, neighborhood_bias
from vlm.kernels.neighborhood.arguments import Windows, axes_of, flat_table
from vlm.kernels.neighborhood.natten import needs_natten, neighborhood_natten
from vlm.kernels.neighborhood.reference import Neighborhood, neighborhood_reference, neighborhood_torch
from vlm.kernels.visibility import Operands, operands

__all__ = ["NAME", "explain", "neighborhood_aggregate", "neighborhood_attention", "neighborhood_bias"]

NAME = "neighborhood_attention"
IMPLEMENTATIONS = (
    Implementation("natten", neighborhood_natten, needs_natten),
    Implementation(
        "flex", lazy("vlm.kernels.neighborhood.flex", "neighborhood_flex"), dispatch.needs_flex, dispatch.slow_on_cpu
    ),
    Implementation("torch", neighborhood_torch),
    Implementation("reference", neighborhood_reference),
)


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    *,
    bias: Tensor | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    extra_bias: Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
    scale: float | None = None,
    kv_head_of: Tensor | None = None,
    **windows: Unpack[Windows],
) -> Tensor: ...
@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    *,
    bias: Tensor | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    extra_bias: Tensor | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
    scale: float | None = None,
    kv_head_of: Tensor | None = None,
    **windows: Unpack[Windows],
) -> tuple[Tensor, Tensor]: ...
def neighborhood_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens value_dim"],
    shape: tuple[int, ...],
    window: int | tuple[int, ...],
    *,
    bias: Float[Tensor, "heads *offsets"] | None = None,
    extra_kv: tuple[Float[Tensor, "batch kv_heads extra dim"], Float[Tensor, "batch kv_heads extra value_dim"]]
    | None = None,
    extra_bias: Float[Tensor, "heads tokens extra"] | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    scale: float | None = None,
    kv_head_of: Int[Tensor, " heads"] | None = None,
    **windows: Unpack[Windows],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each token to its window; a token is always in its own window.

    Args:
        q, k, v: tokens in raster order of ``shape`` (the last axis runs fastest).
        shape: of the grid, 1 to 3 axes.
        window: keys along each axis, or one number for all axes.
        bias: [heads, 2 window - 1 of each axis], added to the scores: axis by axis the entry is key minus query plus
            window - 1, counted in steps of the dilation. Row-major over the axes, as NATTEN's ``rpb`` was. Under
            ``border="clip"`` with stride 1 only the middle entries, offsets inside the window, are read.
        extra_kv: (k, v) of keys that every query sees, beside its window and in the same softmax.
        extra_bias: added to the scores of the extra keys.
        scale: of the scores; ``dim ** -0.5`` if not given.
        kv_head_of: the key/value head that each query head reads; ``h // (heads / kv_heads)`` if not given.
        **windows: stride, dilation, causal, border; see :class:`~vlm.kernels.neighborhood.arguments.Windows`.

    Returns:
        out [batch, heads, tokens, value_dim]; with ``return_lse`` also the natural log-sum-exp of the scores
        [batch, heads, tokens] in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape that does not hold the tokens, window * dilation above the length of an axis (unless
            ``border="clip"``), a stride above the window, tensors whose shapes, types or devices do not fit, or an
            ``impl`` that cannot run here.
    """
    x = operands(NAME, q, k, v, {"causal": False, "scale": scale, "kv_head_of": kv_head_of})
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{NAME}: k must have the {q.shape[2]} tokens of q; found {k.shape[2]}")
    axes = axes_of(NAME, q.shape[2], shape, window, windows)
    table = None if bias is None else flat_table(NAME, bias, q.shape[1], axes, q)
    extra_k, extra_v = _extra(x, extra_kv, extra_bias)
    n = Neighborhood(axes, table, extra_k, extra_v, None if extra_k is None else extra_bias, return_lse)
    call = Call.of(q, k, v, bias, extra_k, extra_v, extra_bias, neighborhood=n, scale=x.scale)
    out, lse = dispatch.choose(NAME, IMPLEMENTATIONS, impl, call).run(x, n)
    return (out, lse) if return_lse else out


def explain(call: Call) -> Choice:
    """What ``impl="auto"`` runs for ``call`` (a plain window without biases if it says no more), and why not others."""
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)


def _extra(
    x: Operands, extra_kv: tuple[Tensor, Tensor] | None, extra_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The keys and values that every query sees, checked; None where there is none."""
    if extra_kv is None:
        if extra_bias is not None:
            raise ValueError(f"{NAME}: extra_bias needs extra_kv; found None")
        return None, None
    count = extra_kv[0].shape[-2] if extra_kv[0].ndim == 4 else 0
    for name, extra, like in (("extra_kv[0]", extra_kv[0], x.k), ("extra_kv[1]", extra_kv[1], x.v)):
        assert like is not None
        expected = (*like.shape[:2], count, like.shape[3])
        if tuple(extra.shape) != expected or extra.dtype != like.dtype or extra.device != like.device:
            found = f"{tuple(extra.shape)}, {extra.dtype} on {extra.device}"
            raise ValueError(f"{NAME}: {name} must be {expected}, {like.dtype} on {like.device}; found {found}")
    if extra_bias is not None:
        expected = (x.q.shape[1], x.q.shape[2], count)
        if tuple(extra_bias.shape) != expected or extra_bias.device != x.q.device:
            found = f"{tuple(extra_bias.shape)} on {extra_bias.device}"
            raise ValueError(f"{NAME}: extra_bias must be {expected} on {x.q.device}; found {found}")
    return extra_kv if count else (None, None)
