"""The definition of received attention in plain PyTorch: any float type, any device, differentiable."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.kernels.visibility import Operands

MOST_SCORES = 2**23  # that the chunked version holds at once, over batch and heads


def received_reference(
    x: Operands,
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    reduce: str,
) -> Float[Tensor, "batch heads keys"]:
    scores, seen = chosen_scores(x, rows)
    # softmax of a row that sees nothing has to stay a number, though of no meaning: such a row weighs nothing
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min if lse is None else float("-inf"))
    if lse is None:
        attention = scores.softmax(-1)  # [B,H,R,K]
    else:
        norm = lse.to(scores.dtype).gather(2, rows.clamp_min(0)[:, None].expand(scores.shape[:3]))
        attention = torch.exp(scores - norm.masked_fill(norm == float("-inf"), float("inf"))[..., None])
    weight = row_weight.to(scores.dtype)[:, None, None] * seen.any(-1)[:, :, None]  # [B,1,1,R]
    if reduce == "sum":
        return (weight @ attention).squeeze(2)
    if reduce == "sumsq":
        return (weight @ attention.square()).squeeze(2)
    if not rows.shape[1]:
        return attention.sum(2)
    attention = attention * (weight > 0).transpose(-1, -2)
    first = attention.argmax(2, keepdim=True)  # of equal rows the first gets the gradient
    return attention.gather(2, first).squeeze(2)


def received_torch(
    x: Operands,
    lse: Float[Tensor, "batch heads rows"] | None,
    rows: Int[Tensor, "batch chosen"],
    row_weight: Float[Tensor, "batch chosen"],
    reduce: str,
) -> Float[Tensor, "batch heads keys"]:
    """The reference for a few chosen rows at a time, recomputed in the backward: chunk x keys of memory."""
    x = replace(x, k=x.k.to(x.accumulator))  # once, not for every chunk
    scores_of_a_row = x.q.shape[0] * x.q.shape[1] * x.k.shape[2]
    chunk = max(1, MOST_SCORES // max(1, scores_of_a_row))
    parts = zip(rows.split(chunk, 1), row_weight.split(chunk, 1), strict=True)
    received = _part(x, lse, *next(parts), reduce)
    for some, weight in parts:
        part = _part(x, lse, some, weight, reduce)
        received = torch.where(part > received, part, received) if reduce == "max" else received + part
    return received


def chosen_attention(x: Operands, rows: Int[Tensor, "batch chosen"]) -> Float[Tensor, "batch heads chosen keys"]:
    """The attention of the chosen rows itself; 0 in a row that sees nothing. chosen x keys of memory."""
    scores, seen = chosen_scores(x, rows)
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0)


def chosen_scores(
    x: Operands, rows: Int[Tensor, "batch chosen"]
) -> tuple[Float[Tensor, "batch heads chosen keys"], Bool[Tensor, "batch 1 chosen keys"]]:
    """Scaled scores of the chosen rows, and which keys they see."""
    at = rows.clamp_min(0)  # the visibility of a row of -1 hides every key
    q = x.q.gather(2, at[:, None, :, None].expand(-1, x.q.shape[1], -1, x.q.shape[3]))  # [B,H,R,D]
    return _scores(q.to(x.accumulator) * x.scale, x), x.seen.pick(rows).mask()


def _part(
    x: Operands, lse: Tensor | None, rows: Tensor, row_weight: Tensor, reduce: str
) -> Float[Tensor, "batch heads keys"]:
    run = (x, lse, rows, row_weight, reduce)
    if not torch.is_grad_enabled():
        return received_reference(*run)
    return checkpoint(received_reference, *run, use_reentrant=False, preserve_rng_state=False)


def _scores(q: Float[Tensor, "batch heads chosen dim"], x: Operands) -> Float[Tensor, "batch heads chosen keys"]:
    """q k^T of exact products also for 16-bit inputs."""
    k = x.k.to(q.dtype)
    if x.kv_head_of is not None:
        return q @ x.per_head(k).transpose(-1, -2)
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B,KV,heads of the group * R,D]: keys stay as they are
    return (grouped @ k.transpose(-1, -2)).view(*q.shape[:3], k.shape[2])
