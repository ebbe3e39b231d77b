"""Attention in parts: states of disjoint sets of keys, put together, weighted against each other, taken apart.

The state of a row over a set of keys is ``(out, lse)``: the softmax-weighted value, and the natural log of the sum of
the exponentiated scores. An empty state is ``(0, -inf)``. Attention over the union of disjoint sets follows from
their states alone (online softmax; Milakov and Gimelshein, 2018; flash attention). Everything is plain PyTorch, in
fp32 whatever the type of ``out`` (fp64 for fp64): merging many parts in half precision would lose their last bits.

    log-sum-exps may be replaced by other log weights of the parts (Landmark Attention: the score of a block's
    landmark) or raised by a gate (a part that stands for more keys than it has: log of their ratio).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

State = tuple[Float[Tensor, "*rows value_dim"], Float[Tensor, "*rows"]]
GatedState = tuple[Float[Tensor, "*rows value_dim"], Float[Tensor, "*rows"], Tensor]

LEAST_REMAINDER = {torch.float32: 1e-6, torch.float64: 1e-12}  # less of the whole than this is rounding
LEAST_REMAINDER_OF_HALF = 2.0**-6  # outs of 16 bits: what remains below this is mostly their rounding


def shares(
    log_weights: Float[Tensor, "parts *rows"],
) -> tuple[Float[Tensor, "parts *rows"], Float[Tensor, "*rows"]]:
    """(share of each part, log of the whole); a part of -inf has share 0, and so have all where all are -inf."""
    empty = log_weights.isneginf().all(0)
    lse = log_weights.masked_fill(empty, 0).logsumexp(0)  # logsumexp of -inf alone has gradient nan
    return torch.exp(log_weights - lse), lse.masked_fill(empty, float("-inf"))


def merge_states(states: Sequence[State | GatedState]) -> State:
    """The state over the union of the keys of ``states``, which must be disjoint.

    Args:
        states: (out [..., value_dim], lse [...]) each, or (out, lse, log_gate) to count a part exp(log_gate) times;
            log_gate broadcasts against lse.

    Returns:
        (out, lse) in fp32 (fp64 if any state is in fp64): merge that further, and cast ``out`` at the end. Rows that
        are empty in every state are empty.

    Raises:
        ValueError: no state, or shapes that differ.
    """
    if not states:
        raise ValueError("merge_states: states must hold one state or more; found none")
    for number, (out, lse, *_) in enumerate(states):
        _check("merge_states", f"states[{number}]", out, lse, states[0][0])
    dtype = _accumulator(*(state[0] for state in states))
    logs = torch.stack([sum((x.to(dtype) for x in gate), lse.to(dtype)) for _, lse, *gate in states])  # [R,...]
    share, lse = shares(logs)
    merged = torch.zeros_like(states[0][0], dtype=dtype)
    for part, (out, *_) in zip(share, states, strict=True):
        merged = merged + part[..., None] * out.to(dtype)
    return merged, lse


def downdate_state(full: State, part: State, *, validate: bool = True) -> State:
    """The state over the keys of ``full`` without those of ``part``: what :func:`merge_states` would undo.

    The error of ``out`` grows with 1 / (what remains of the weight). A row of which less than 1e-6 remains (1e-12 in
    fp64) counts as empty. With ``out`` in 16 bits a row of which less than 1/64 but not nothing remains is refused:
    compute it from its keys instead, or keep states in fp32.

    Args:
        full, part: (out [..., value_dim], lse [...]) of a set of keys and of a subset of it.
        validate: look at the values (waits for the GPU). Without, a refused row comes out inexact.

    Returns:
        (out, lse) in fp32 (fp64 if either state is in fp64).

    Raises:
        ValueError: shapes that differ; a part that weighs more than the whole; a row that is refused.
    """
    _check("downdate_state", "full", *full, full[0])
    _check("downdate_state", "part", *part, full[0])
    dtype = _accumulator(full[0], part[0])
    (whole, lse), (removed, removed_lse) = ((out.to(dtype), log.to(dtype)) for out, log in (full, part))
    nothing = lse.isneginf()
    removed_share = torch.exp(removed_lse - torch.where(nothing, 0, lse))  # 0 for an empty part
    remains = 1 - removed_share
    empty = nothing | (remains <= LEAST_REMAINDER[dtype])
    if validate:
        _refuse(remains, nothing & ~removed_lse.isneginf(), empty, min(full[0].element_size(), part[0].element_size()))
    remains = torch.where(empty, 1, remains)  # finite where nothing remains, and so is its gradient
    out = (whole - removed_share[..., None] * removed) / remains[..., None]
    return out.masked_fill(empty[..., None], 0), (lse + remains.log()).masked_fill(empty, float("-inf"))


def _refuse(remains: Tensor, foreign: Tensor, empty: Tensor, bytes_of_out: int) -> None:
    if bool((foreign | (remains < -1e-3)).any()):
        raise ValueError("downdate_state: part must be a part of full; found a row where it weighs more than the whole")
    imprecise = ~empty & (remains < LEAST_REMAINDER_OF_HALF)
    if bytes_of_out == 2 and bool(imprecise.any()):
        raise ValueError(
            "downdate_state: with states of 16 bits at least 1/64 of a row's weight must remain; found "
            f"{float(remains[imprecise].min()):.2g} (compute these {int(imprecise.sum())} rows from their keys)"
        )


def _accumulator(*outs: Tensor) -> torch.dtype:
    return torch.float64 if any(out.dtype == torch.float64 for out in outs) else torch.float32


def _check(op: str, name: str, out: Tensor, lse: Tensor, like: Tensor) -> None:
    if out.shape != like.shape or lse.shape != like.shape[:-1]:
        raise ValueError(
            f"{op}: {name} must be (out {tuple(like.shape)}, lse {tuple(like.shape[:-1])}); "
            f"found {tuple(out.shape)}, {tuple(lse.shape)}"
        )
