"""Linear attention: a state instead of a key/value cache, with decay and feature maps.

    S_t = exp(g_t) S_{t-1} + phi(k_t) v_t^T          out_t = scale phi(q_t) S_t

Time and memory grow with the number of tokens, not with its square. With a constant decay per head it is retention
(Sun et al., 2023) and Lightning Attention (Qin et al., 2024), with ``taylor2`` BASED (Arora et al., ICML 2024), with a
decay per channel gated linear attention (Yang et al., ICML 2024) and LightNet (Qin et al., 2024), and without order
(``causal=False``) the linear attention of vision transformers.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.kernels import dispatch
from vlm.kernels.dispatch import Call, Choice, Implementation, any_of, lazy, needs_triton, only_for_tests
from vlm.kernels.linear.arguments import (
    State,
    check_decay,
    check_options,
    check_tokens,
    decay_of_tokens,
    document_starts,
    joined_state,
    mapped,
    without_padding,
)
from vlm.kernels.linear.chunk import scan_chunked
from vlm.kernels.linear.reference import scan_reference
from vlm.kernels.linear.scan import Scan

NAME, STEP = "linear_attention", "linear_attention_step"
EPSILON = 1e-6  # added to the normaliser; flash-linear-attention does so for BASED


def _no_kernel(call: Call) -> str | None:
    if not call.more.get("causal", True):
        return "without order there is nothing to scan: two matrix products do it"
    if call.more.get("decay") == "channel":
        return "there is no kernel for a decay per channel"
    chunk = call.more.get("chunk", 64)
    return None if chunk in (16, 32, 64, 128) else f"chunk must be 16, 32, 64 or 128; found {chunk}"


def _one_by_one(call: Call) -> str | None:
    return "it goes token by token; name it to run it" if call.rows > 1 else None


IMPLEMENTATIONS = (
    Implementation(
        "triton",
        lazy("vlm.kernels.linear.triton_backward", "scan_triton"),
        any_of(_no_kernel, needs_triton),
        only_for_tests,
    ),
    Implementation("chunk", scan_chunked),
    Implementation("reference", scan_reference, passed_over=_one_by_one),
)


def linear_attention(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch kv_heads length dim"],
    v: Float[Tensor, "batch kv_heads length value_dim"],
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    feature: str = "identity",
    normalize: bool = False,
    causal: bool = True,
    initial_state: State | None = None,
    output_state: bool = False,
    chunk: int = 64,
    valid: Bool[Tensor, "batch length"] | None = None,
    documents: Int[Tensor, "batch length"] | None = None,
    scale: float | None = None,
    validate: bool = True,
    impl: str = "auto",
) -> Float[Tensor, "batch heads length value_dim"] | tuple[Float[Tensor, "batch heads length value_dim"], State]:
    """Attention whose scores are products of features; causal, it keeps a state instead of keys and values.

    Args:
        log_decay: natural log of what is left of the state when a token comes, before its own key is added: 0 or
            less, -inf forgets all. [kv_heads] constant, [batch, kv_heads, length] per token, or
            [batch, kv_heads, length, features] per token and feature of the key.
        feature: ``"identity"``, ``"silu"``, ``"elu+1"`` or ``"taylor2"``, which makes of dim numbers
            ``1 + dim + dim (dim + 1) / 2`` features; the others keep dim.
        normalize: divide each row by the sum of its scores (plus 1e-6). Meant for features that are not negative.
        causal: a row reads the state after its own token. Without, every row reads the state after the last token of
            its document, and there is no decay.
        initial_state: the state before the first token, as ``output_state`` gave it.
        output_state: also return the state after the last token: [batch, kv_heads, features, value_dim] in fp32 (fp64
            for fp64), with ``normalize`` a pair of it and its normaliser, [batch, kv_heads, features].
        chunk: tokens taken at a time; the result does not depend on it.
        valid: False at padding, which leaves the state as it is and whose rows are 0.
        documents: for every token a number, 0 or more, of the packed sample it belongs to. Where it changes the state
            starts from 0. The initial state belongs to the first document, the returned one to the last.
        scale: of the scores; ``dim ** -0.5`` if not given. With ``taylor2`` it is of x.y inside the polynomial.
        validate: look at the values of decays and documents, not at shapes and types only (waits for the GPU).
        impl: ``"auto"``, ``"triton"`` (for one decay per head or token, or none), ``"chunk"`` or ``"reference"``.

    Returns:
        [batch, heads, length, value_dim] in the type of q, and the state if asked for. Query head h reads the state of
        key head ``h // (heads / kv_heads)``.

    Raises:
        ValueError: shapes or types that do not fit, a decay that is positive, nan or without order, an unknown
            feature, or an ``impl`` that cannot run here.
    """
    check_tokens(NAME, q, k, v, valid, documents, validate)
    check_options(NAME, feature, chunk, scale)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    inside, outside = (factor, 1.0) if feature == "taylor2" else (1.0, factor)
    queries, keys = mapped(feature, q, valid, inside), mapped(feature, k, valid)
    kind = check_decay(NAME, log_decay, keys, causal, validate)
    accumulator = torch.promote_types(v.dtype, torch.float32)
    values = without_padding(v, valid)
    x = Scan(
        q=queries,
        k=keys,
        v=torch.cat([values, torch.ones_like(v[..., :1])], -1) if normalize else values,
        scale=outside,
        out_dtype=accumulator if normalize else q.dtype,
        log_decay=decay_of_tokens(log_decay, kind, k.shape[2], valid, accumulator),
        starts=document_starts(documents, valid),
        state=joined_state(NAME, initial_state, keys, v, normalize),
        causal=causal,
        chunk=chunk,
        feature=feature,
    )
    call = Call.of(q, k, v, log_decay, x.state, decay=kind, causal=causal, chunk=chunk, feature=feature)
    out, state = dispatch.choose(NAME, IMPLEMENTATIONS, impl, call).run(x)
    if normalize:
        out = (out[..., :-1] / (out[..., -1:] + EPSILON)).to(q.dtype)
        state = (state[..., :-1], state[..., -1])
    return (out, state) if output_state else out


def explain(call: Call) -> Choice:
    """What ``impl="auto"`` runs for a call, and why not the others.

    ``more`` may hold causal (True), chunk (64) and decay, which is "none", "head", "token" or "channel".
    """
    return dispatch.explain(NAME, IMPLEMENTATIONS, call)


def linear_attention_step(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch kv_heads dim"],
    v: Float[Tensor, "batch kv_heads value_dim"],
    state: State | None,
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    feature: str = "identity",
    normalize: bool = False,
    valid: Bool[Tensor, " batch"] | None = None,
    scale: float | None = None,
    validate: bool = True,
) -> tuple[Float[Tensor, "batch heads value_dim"], State]:
    """One more token, for decoding: :func:`linear_attention` of length 1, and the state after it.

    The reference does it, three operations of PyTorch that read and write the state once; a kernel would do no less.

    Args:
        state: as :func:`linear_attention` or this function returned it; None before the first token.
        log_decay: [kv_heads], [batch, kv_heads] or [batch, kv_heads, features].
        valid: False leaves a sample's state as it is and makes its row 0.

    Raises:
        ValueError: as :func:`linear_attention`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{STEP}: {name} must be [batch, heads, dim]; found shape {tuple(x.shape)}")
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay.unsqueeze(2)
    out, state = linear_attention(
        *(x.unsqueeze(2) for x in (q, k, v)),
        log_decay=log_decay,
        feature=feature,
        normalize=normalize,
        initial_state=state,
        output_state=True,
        valid=None if valid is None else valid[:, None],
        scale=scale,
        validate=validate,
        impl="reference",
    )
    return out.squeeze(2), state
