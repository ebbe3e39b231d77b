"""The arguments of linear attention, checked and brought into the form that every implementation takes."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels.linear.features import FEATURES, feature_map
from vlm.kernels.visibility import check, check_tensors

State = Tensor | tuple[Tensor, Tensor]  # [batch, kv_heads, features, value_dim], with its normaliser if there is one


def check_tokens(
    op: str, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, documents: Tensor | None, look: bool
) -> None:
    """Refuse queries, keys and values, or what is known of each token, that do not fit."""
    check_tensors(op, q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q and k must have the same length; found {q.shape[2]}, {k.shape[2]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: query heads must be a multiple of key heads; found {heads}, {kv_heads}")
    tokens = (q.shape[0], q.shape[2])
    if valid is not None:
        check(op, "valid", valid, tokens, q.device)
        if valid.dtype != torch.bool:
            raise ValueError(f"{op}: valid must be bool; found {valid.dtype}")
    if documents is not None:
        check(op, "documents", documents, tokens, q.device, 0, look=look)


def check_options(op: str, feature: str, chunk: int, scale: float | None) -> None:
    if feature not in FEATURES:
        raise ValueError(f"{op}: feature must be one of {', '.join(FEATURES)}; found {feature!r}")
    if chunk < 1:
        raise ValueError(f"{op}: chunk must be 1 or more; found {chunk}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite; found {scale}")


def mapped(
    feature: str,
    x: Float[Tensor, "batch heads length dim"],
    valid: Bool[Tensor, "batch length"] | None,
    scale: float = 1.0,
) -> Float[Tensor, "batch heads length features"]:
    """The features of ``scale x``, 0 at padding. Only the identity leaves them in the type of ``x``."""
    if scale != 1.0:
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    features = feature_map(feature, without_padding(x, valid))  # a gradient of 0 times nan would be nan
    return features if feature in ("identity", "silu") else without_padding(features, valid)  # those are 0 at 0


def without_padding(
    x: Float[Tensor, "one_or_batch heads length any"], valid: Bool[Tensor, "batch length"] | None
) -> Float[Tensor, "same_or_batch heads length any"]:
    """0 at padding, whatever stood there."""
    return x if valid is None else x.masked_fill(~valid[:, None, :, None], 0.0)


def document_starts(
    documents: Int[Tensor, "batch length"] | None, valid: Bool[Tensor, "batch length"] | None
) -> Bool[Tensor, "batch length"] | None:
    """True at a token whose document is another than that of the real token before it. Padding counts for nothing."""
    if documents is None:
        return None
    if valid is None:
        valid = torch.ones_like(documents, dtype=torch.bool)
    index = torch.arange(documents.shape[1], device=documents.device)
    latest = torch.where(valid, index, -1).cummax(1).values  # the latest real token up to each, -1 for none
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)[:, : documents.shape[1]]
    return valid & (before >= 0) & (documents != documents.gather(1, before.clamp_min(0)))


def check_decay(
    op: str,
    log_decay: Tensor | None,
    k: Float[Tensor, "batch kv_heads length features"],
    causal: bool,
    look: bool,
) -> str:
    """What kind of decay it is: "none", "head", "token" or "channel". Refuse what is none of them."""
    if log_decay is None:
        return "none"
    if not causal:
        raise ValueError(f"{op}: log_decay must be None without causal, where tokens have no order; found a tensor")
    shapes = {1: ("head", tuple(k.shape[1:2])), 3: ("token", tuple(k.shape[:3])), 4: ("channel", tuple(k.shape))}
    if log_decay.ndim not in shapes:
        wanted = ", ".join(str(shape) for _, shape in shapes.values())
        raise ValueError(f"{op}: log_decay must have one of the shapes {wanted}; found {tuple(log_decay.shape)}")
    kind, shape = shapes[log_decay.ndim]
    check(op, "log_decay", log_decay, shape, k.device)
    if not log_decay.dtype.is_floating_point:
        raise ValueError(f"{op}: log_decay must be floating; found {log_decay.dtype}")
    if look and log_decay.numel():
        largest = float(log_decay.detach().amax())
        if not largest <= 0:
            raise ValueError(f"{op}: log_decay must be 0 or less, and never nan; found {largest}")
    return kind


def decay_of_tokens(
    log_decay: Tensor | None, kind: str, length: int, valid: Tensor | None, accumulator: torch.dtype
) -> Float[Tensor, "one_or_batch kv_heads length one_or_features"] | None:
    """A log-decay for every token, which padding leaves at 0."""
    if log_decay is None:
        return None
    decay = log_decay.to(accumulator)
    if kind == "head":
        decay = decay[None, :, None, None].expand(1, -1, length, 1)
    elif kind == "token":
        decay = decay[..., None]
    return without_padding(decay, valid)


def joined_state(
    op: str,
    state: State | None,
    k: Float[Tensor, "batch kv_heads length features"],
    v: Float[Tensor, "batch kv_heads length value_dim"],
    normalize: bool,
) -> Float[Tensor, "batch kv_heads features value_dim_or_one_more"] | None:
    """The initial state with its normaliser, if there is one, as one more column."""
    if state is None:
        return None
    if normalize != isinstance(state, tuple):
        wanted = "a pair of a state and its normaliser" if normalize else "a tensor"
        raise ValueError(f"{op}: initial_state must be {wanted}; found a {type(state).__name__}")
    whole, normaliser = state if isinstance(state, tuple) else (state, None)
    check(op, "initial_state", whole, (*k.shape[:2], k.shape[3], v.shape[3]), k.device)
    if normaliser is None:
        return whole
    check(op, "the normaliser of initial_state", normaliser, (*k.shape[:2], k.shape[3]), k.device)
    return torch.cat([whole, normaliser[..., None]], -1)
