"""Dense attention: softmax over all the keys that a row may see, by whatever does it best here.

    out = softmax(scale * q k^T) v

Nothing of our own is faster than what PyTorch has, so this only chooses: SDPA where the log-sum-exp is not asked for
and its fused kernels take the call, FlexAttention for masks and log-sum-exps on CUDA, row chunks elsewhere.
"""

from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dense.reference import dense_reference, dense_torch
from vlm.kernels.dense.sdpa import dense_sdpa, plain
from vlm.kernels.dispatch import Call, Choice, Implementation, lazy, needs_flex, slow_on_cpu
from vlm.kernels.visibility import Common, operands

NAME = "dense_attention"


def _no_lse(call: Call) -> str | None:
    return "SDPA returns no differentiable log-sum-exp" if call.more.get("lse", False) else None


def _no_fused_sdpa(call: Call) -> str | None:
    """Where SDPA has no fused kernel it builds the score matrix."""
    sizes = f"head dims {call.dim} and {call.value_dim}"
    if call.device.type == "cpu":
        return None if call.dim == call.value_dim else f"for {sizes} SDPA on a CPU builds the whole score matrix"
    if call.device.type == "cuda":
        if not call.more.get("plain", True):
            return "with a mask SDPA has no flash kernel and skips no tile; FlexAttention has and does"
        if call.dtype.itemsize == 8:
            return "for fp64 SDPA on CUDA builds the whole score matrix"
        flash = call.dtype.itemsize == 2 and call.dim == call.value_dim <= 256
        aligned = 16 // call.dtype.itemsize
        if not flash and (call.dim % aligned or call.value_dim % aligned):
            return f"for {sizes} in {call.dtype} SDPA on CUDA builds the whole score matrix"
        return None
    return f"on {call.device.type} SDPA may build the whole score matrix"


IMPLEMENTATIONS = (
    Implementation("sdpa", dense_sdpa, _no_lse, _no_fused_sdpa),
    Implementation("flex", lazy("vlm.kernels.dense.flex", "dense_flex"), needs_flex, slow_on_cpu),
    Implementation("torch", dense_torch),
    Implementation("reference", dense_reference),
)


def dense_attention(
    q: Float[Tensor, "batch heads rows dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    return_lse: bool = False,
    impl: str = "auto",
    **common: Unpack[Common],
) -> Float[Tensor, "batch heads rows value_dim"] | tuple[Tensor, Tensor]:
    """Softmax attention over every key that a row sees.

    Args:
        return_lse: also return the natural log-sum-exp of the scores [batch, heads, rows], in fp32 (fp64 for fp64
            inputs) and differentiable: what :mod:`vlm.kernels.state` merges.
        **common: see :class:`~vlm.kernels.visibility.Common`.

    Returns:
        out [batch, heads, rows, value_dim] in the type of the inputs, or (out, log-sum-exp). A row that sees no key
        gives 0 and -inf.

    Raises:
        ValueError: shapes, types or devices that do not fit, or an ``impl`` that cannot run here.
    """
    x = operands(NAME, q, k, v, common)
    call = Call.of(q, k, v, lse=return_lse, plain=plain(x.seen))
    out, lse = dispatch.choose(NAME, IMPLEMENTATIONS, impl, call).run(x, return_lse)
    return (out, lse) if return_lse else out


def explain(call: Call) -> Choice:
    """Which implementation ``impl="auto"`` takes for a call, and why not the others."""
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)
