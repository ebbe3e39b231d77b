"""Linear attention against sums over pairs of tokens, one pair after the other, and what follows from them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MiniMaxConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from vlm.kernels.dispatch import Call
from vlm.kernels.linear import IMPLEMENTATIONS, NAME, explain, linear_attention, linear_attention_step
from vlm.kernels.linear.decay import cumulative_softmax, lightning_decay
from vlm.kernels.linear.features import FEATURES, feature_dim, feature_map, similarity

KINDS = ("none", "head", "token", "channel")
DOUBLE = {"dtype": torch.float64}


def draw(seed=0, batch=2, heads=(2, 1), length=9, dim=3, value_dim=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    make = lambda h, d: torch.randn(batch, h, length, d, generator=g, dtype=dtype)  # noqa: E731
    return make(heads[0], dim), make(heads[1], dim), make(heads[1], value_dim)


def draw_decay(kind, k, seed=0, feature="identity"):
    """Log-decays of a kind; of those per token some forget everything."""
    g = torch.Generator().manual_seed(seed + 1)
    features = feature_dim(feature, k.shape[-1])
    shapes = {"head": k.shape[1:2], "token": k.shape[:3], "channel": (*k.shape[:3], features)}
    if kind == "none":
        return None
    decay = -2 * torch.rand(shapes[kind], generator=g, dtype=k.dtype)
    return decay if kind == "head" else decay.masked_fill(torch.rand(decay.shape, generator=g) < 0.1, -torch.inf)


def draw_tokens(seed, batch, length):
    """(valid, documents): holes and padding on both sides; packed samples of one token and more."""
    g = torch.Generator().manual_seed(seed + 2)
    valid = torch.rand(batch, length, generator=g) > 0.25
    documents = (torch.rand(batch, length, generator=g) < 0.3).long().cumsum(1)
    return valid, documents.where(valid, torch.tensor(99))  # what stands at padding means nothing


def pair_sums(q, k, v, decay, feature, causal, valid, documents, state, scale):
    """(weighted values, sums of weights, the last state) from the weight of every pair of tokens."""
    batch, heads, length, _ = q.shape
    fq, fk = feature_map(feature, q * scale if feature == "taylor2" else q), feature_map(feature, k)
    fq = fq if feature == "taylor2" else fq * scale
    step = torch.zeros(*k.shape[:3], fk.shape[-1], **DOUBLE)
    if decay is not None:
        step = step + decay.reshape(*[1] * (decay.ndim == 1), *decay.shape, *[1] * (4 - max(2, decay.ndim)))
    step = step.masked_fill(~valid[:, None, :, None], 0.0)
    left = torch.zeros(*k.shape[:2], length, length + 1, fk.shape[-1], **DOUBLE)  # [B,Hk,i,1 + j,F]; before all: j = -1
    for i, j in itertools.product(range(length), range(-1, length)):
        if j <= i or not causal:
            left[:, :, i, j + 1] = step[:, :, j + 1 : i + 1].sum(2).exp()
    real = [row.nonzero().flatten().tolist() for row in valid]
    begin = torch.tensor([tokens[0] if tokens else 0 for tokens in real])
    end = torch.tensor([tokens[-1] if tokens else 0 for tokens in real])
    started = documents == documents.gather(1, begin[:, None])  # [B,N]: in the first document
    same = (documents[:, :, None] == documents[:, None, :]) & valid[:, None, :]
    per_head = lambda x: x.repeat_interleave(heads // k.shape[1], 1)  # noqa: E731
    pairs = torch.einsum("bhif,bhijf,bhjf->bhij", fq, per_head(left[:, :, :, 1:]), per_head(fk)) * same[:, None]
    top = pairs @ per_head(v)
    if state is not None:
        top = top + (fq * per_head(left[:, :, :, 0]) * started[:, None, :, None]) @ per_head(state)
    rows = torch.arange(batch)
    last = left[rows, :, end]  # [B,Hk,1 + N,F]
    final = (last[:, :, 1:] * fk * same[rows, end][:, None, :, None]).transpose(-1, -2) @ v
    if state is not None:
        final = final + last[:, :, 0, :, None] * started[rows, end][:, None, None, None] * state
    shown = valid[:, None, :, None]
    return top * shown, pairs.sum(-1, keepdim=True) * shown, final


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    st.integers(1, 8),
    st.sampled_from(["none", "head", "token", "channel", "no order"]),
    st.sampled_from(FEATURES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 3, 8, 64]),
    st.integers(0, 10_000),
)
def test_equals_the_sums_over_pairs(heads, length, kind, feature, packed, with_state, chunk, seed):
    q, k, v = draw(seed, 2, heads, length)
    causal = kind != "no order"
    decay = draw_decay(kind, k, seed, feature) if causal else None
    valid, documents = draw_tokens(seed, 2, length)
    if not packed:
        valid, documents = torch.ones_like(valid), torch.zeros_like(documents)
    state = None
    if with_state:
        state = torch.randn(
            2, heads[1], feature_dim(feature, 3), 4, generator=torch.Generator().manual_seed(seed), **DOUBLE
        )
    top, bottom, final = pair_sums(q, k, v, decay, feature, causal, valid, documents, state, 0.7)
    common = {"log_decay": decay, "feature": feature, "causal": causal, "chunk": chunk, "scale": 0.7}
    common |= {"valid": valid, "documents": documents} if packed else {}
    for impl in ("reference", "chunk"):
        out, after = linear_attention(q, k, v, initial_state=state, output_state=True, impl=impl, **common)
        torch.testing.assert_close(out, top, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after, final, rtol=1e-10, atol=1e-10)
        if state is None and feature in ("elu+1", "taylor2"):
            out = linear_attention(q, k, v, normalize=True, impl=impl, **common)
            torch.testing.assert_close(out, top / (bottom + 1e-6), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 80), st.integers(1, 100), st.sampled_from(KINDS))
def test_a_chunk_of_any_size_gives_the_same(length, chunk, kind):
    q, k, v = draw(length, 1, (2, 1), length)
    decay = draw_decay(kind, k, length)
    out, state = linear_attention(q, k, v, log_decay=decay, output_state=True, impl="reference")
    got, after = linear_attention(q, k, v, log_decay=decay, output_state=True, chunk=chunk, impl="chunk")
    torch.testing.assert_close(got, out, rtol=0, atol=1e-10)
    torch.testing.assert_close(after, state, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 12), st.sampled_from(KINDS), st.sampled_from(FEATURES), st.booleans())
def test_the_state_goes_on_where_it_was_left(split, kind, feature, normalize):
    """In two calls, and token by token: the same rows as in one call."""
    q, k, v = draw(3, 2, (4, 2), 12)
    valid, _ = draw_tokens(5, 2, 12)
    decay = draw_decay(kind, k, feature=feature)
    kinds = {"feature": feature, "normalize": normalize}
    whole, last = linear_attention(q, k, v, log_decay=decay, valid=valid, output_state=True, **kinds)
    part = lambda x, at: x[:, :, at] if x is not None and x.ndim > 1 else x  # noqa: E731
    first, rest = slice(0, split), slice(split, 12)
    out, state = linear_attention(
        *(part(x, first) for x in (q, k, v)),
        log_decay=part(decay, first),
        valid=valid[:, first],
        output_state=True,
        chunk=4,
        **kinds,
    )
    rows = [out]
    with_rest = linear_attention(
        *(part(x, rest) for x in (q, k, v)),
        log_decay=part(decay, rest),
        valid=valid[:, rest],
        initial_state=state,
        **kinds,
    )
    torch.testing.assert_close(torch.cat([out, with_rest], 2), whole, rtol=1e-9, atol=1e-10)
    for t in range(split, 12):
        row, state = linear_attention_step(
            *(part(x, t) for x in (q, k, v)), state, log_decay=part(decay, t), valid=valid[:, t], **kinds
        )
        rows.append(row[:, :, None])
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-9, atol=1e-10)
    for got, expected in zip(*(s if normalize else (s,) for s in (state, last)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_without_decay_the_state_is_a_cumulative_sum():
    q, k, v = draw(length=40)
    sums = (k[..., :, None] * v[..., None, :]).cumsum(2)
    expected = (q[..., None, :] @ sums).squeeze(-2) * 3**-0.5
    for decay in (None, torch.zeros(1, **DOUBLE), torch.zeros(2, 1, 40, **DOUBLE), torch.zeros_like(k)):
        got = linear_attention(q, k, v, log_decay=decay, chunk=16)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_without_order_it_is_the_sums_of_both_directions(packed):
    q, k, v = draw(length=40)
    valid, documents = draw_tokens(1, 2, 40)
    more = lambda *dims: {"valid": valid.flip(dims), "documents": documents.flip(dims)} if packed else {}  # noqa: E731
    forward = linear_attention(q, k, v, **more())
    backward = linear_attention(*(x.flip(2) for x in (q, k, v)), **more(1)).flip(2)
    itself = (q * k).sum(-1, keepdim=True) * v * 3**-0.5
    if packed:
        itself = itself * valid[:, None, :, None]
    got = linear_attention(q, k, v, causal=False, **more())
    torch.testing.assert_close(got, forward + backward - itself, rtol=0, atol=1e-12)


def test_packed_samples_know_nothing_of_each_other():
    q, k, v = draw(length=12)
    documents = torch.tensor([[4] * 5 + [0] * 1 + [2] * 6]).expand(2, -1)
    decay = draw_decay("token", k)
    for causal, log_decay in ((True, decay), (True, None), (False, None)):
        out, state = linear_attention(
            q, k, v, log_decay=log_decay, causal=causal, documents=documents, output_state=True, chunk=8
        )
        for first, last in ((0, 5), (5, 6), (6, 12)):
            part = [x[:, :, first:last] for x in (q, k, v)]
            of_part = None if log_decay is None else log_decay[:, :, first:last]
            alone, end = linear_attention(*part, log_decay=of_part, causal=causal, output_state=True)
            torch.testing.assert_close(out[:, :, first:last], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("feature", FEATURES)
def test_padding_is_never_read(impl, feature):
    """Rows, the state and gradients are those of the real tokens alone, whatever stands at padding."""
    q, k, v = draw(length=10, heads=(1, 1))
    decay = draw_decay("token", k).clamp_min(-5)
    valid = torch.tensor([[False, True, True, False, True, True, True, True, False, False]]).expand(2, -1)
    real = valid[0].nonzero().flatten()
    inputs = [x.clone().masked_fill_(~valid[:, None, :, None], torch.nan).requires_grad_() for x in (q, k, v)]
    out, state = linear_attention(
        *inputs, log_decay=decay, valid=valid, feature=feature, output_state=True, impl=impl, chunk=4
    )
    alone, end = linear_attention(
        *(x[:, :, real] for x in (q, k, v)), log_decay=decay[:, :, real], feature=feature, output_state=True
    )
    torch.testing.assert_close(out[:, :, real], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)
    assert (out[:, :, ~valid[0]] == 0).all()
    for grad in torch.autograd.grad((out**2).sum() + state.sum(), inputs):
        assert (grad[:, :, ~valid[0]] == 0).all() and grad.isfinite().all()


def test_a_decay_to_nothing_starts_anew():
    q, k, v = draw(length=20)
    decay = torch.full((2, 1, 20), -0.1, **DOUBLE)
    decay[:, :, 7] = -torch.inf
    decay.requires_grad_()
    out = linear_attention(q, k, v, log_decay=decay, chunk=16)
    rest = linear_attention(*(x[:, :, 7:] for x in (q, k, v)), log_decay=decay[:, :, 7:])
    torch.testing.assert_close(out[:, :, 7:], rest, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((out**2).sum(), decay)
    assert grad.isfinite().all() and (grad[:, :, 7] == 0).all()


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_taylor_features_are_exact(dim):
    x, y = torch.randn(5, dim, **DOUBLE), torch.randn(7, dim, **DOUBLE)
    product = x @ y.T
    expected = 1 + product + product**2 / 2
    first, second = feature_map("taylor2", x), feature_map("taylor2", y)
    assert first.shape[1] == feature_dim("taylor2", dim) == 1 + dim + dim * (dim + 1) // 2
    torch.testing.assert_close(first @ second.T, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(similarity("taylor2", first, second), expected, rtol=0, atol=1e-12)
    assert (similarity("taylor2", first, torch.zeros_like(second)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_gradients(kind, impl):
    q, k, v = draw(length=5, heads=(2, 1), dim=2, value_dim=2)
    decay = draw_decay(kind, k)
    state = torch.randn(2, 1, 2, 2, **DOUBLE)
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    inputs = [x.requires_grad_() for x in (q, k, v, state)]
    finite = None if decay is None else decay.clamp_min(-3).requires_grad_()  # next to -inf there are no differences

    def run(q, k, v, state, *decay):
        log_decay = decay[0].clamp_max(0) if decay else None
        return linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            initial_state=state,
            output_state=True,
            documents=documents,
            chunk=2,
            impl=impl,
        )

    assert torch.autograd.gradcheck(run, [*inputs, finite] if finite is not None else inputs, atol=1e-8, fast_mode=True)


def test_gradients_without_order_and_of_the_normaliser():
    q, k, v = (x.requires_grad_() for x in draw(length=5, dim=2, value_dim=2))
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    for causal in (True, False):
        run = lambda q, k, v, causal=causal: linear_attention(  # noqa: E731
            q, k, v, causal=causal, feature="taylor2", normalize=True, documents=documents, chunk=2
        )
        assert torch.autograd.gradcheck(run, (q, k, v), atol=1e-8, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_fp32_and_bf16_stay_near_fp64(kind, feature):
    q, k, v = draw(1, 2, (7, 1), 100, 8, 5)
    decay = draw_decay(kind, k, feature=feature)
    exact = linear_attention(q, k, v, log_decay=decay, feature=feature, impl="reference")
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low = [x.to(dtype) for x in (q, k, v)]
        if dtype == torch.bfloat16:
            exact = linear_attention(*(x.double() for x in low), log_decay=decay, feature=feature, impl="reference")
        out, state = linear_attention(
            *low, log_decay=None if decay is None else decay.float(), feature=feature, output_state=True
        )
        assert out.dtype == dtype and state.dtype == torch.float32
        assert (out.double() - exact).norm() < allowed * exact.norm()


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_long_sequences_stay_finite_under_strong_decay(kind):
    """Sums of log-decays reach -200000; what is near must not suffer from it."""
    length = 4096
    q, k, v = (x.float() for x in draw(2, 1, (1, 1), length, 4, 4))
    shape = k.shape if kind == "channel" else k.shape[:3]
    decay = torch.where(torch.rand(shape) < 0.5, -100.0, -1e-3).requires_grad_()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*inputs, log_decay=decay)
    for grad in torch.autograd.grad((out**2).sum(), [*inputs, decay]):
        assert grad.isfinite().all()
    exact = linear_attention(*(x.detach().double() for x in inputs), log_decay=decay.detach().double(), chunk=16)
    assert (out.double() - exact).norm() < 1e-6 * exact.norm()


def test_light_net_is_a_cumulative_softmax():
    q, k, v = draw(length=30, heads=(2, 2))
    k = k * 30  # far beyond what exp could take alone
    key, decay, last = cumulative_softmax(k)
    out = linear_attention(q, key, v, log_decay=decay, feature="identity", scale=1.0, chunk=16)
    for t in (0, 1, 7, 29):
        state = k[:, :, : t + 1].softmax(2).transpose(-1, -2) @ v[:, :, : t + 1]
        torch.testing.assert_close(out[:, :, t], (q[:, :, t, None] @ state).squeeze(2), rtol=0, atol=1e-10)
    torch.testing.assert_close(last, k.logsumexp(2), rtol=0, atol=1e-12)


def test_light_net_goes_on_and_skips_padding():
    q, k, v = draw(length=12, heads=(2, 2))
    valid = torch.tensor([[False, False, True, True, False, True, True, True, True, False, True, False]]).expand(2, -1)
    real = valid[0]
    padded = k.masked_fill(~valid[:, None, :, None], -torch.inf).requires_grad_()
    alone = cumulative_softmax(k[:, :, real])
    for key, decay, last in (cumulative_softmax(padded), cumulative_softmax(k, valid=valid)):
        assert (key[:, :, ~real] == 0).all() and (decay[:, :, ~real] == 0).all() and last.isfinite().all()
        torch.testing.assert_close(key[:, :, real], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(decay[:, :, real].exp(), alone[1].exp(), rtol=0, atol=1e-12)
    out = linear_attention(q, *cumulative_softmax(padded)[:1], v, log_decay=cumulative_softmax(padded)[1])
    (grad,) = torch.autograd.grad(out.sum(), padded)
    assert grad.isfinite().all() and (grad[:, :, ~real] == 0).all() and (grad[:, :, real] != 0).any()
    first, last = cumulative_softmax(k[:, :, :5]), None
    second = cumulative_softmax(k[:, :, 5:], first[2])
    for whole, parts in zip(cumulative_softmax(k)[:2], zip(first[:2], second[:2], strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, 2).exp(), whole.exp(), rtol=0, atol=1e-12)


def test_light_net_gradient():
    k = torch.randn(1, 1, 4, 2, **DOUBLE, requires_grad=True)
    torch.autograd.gradcheck(lambda k: cumulative_softmax(k, torch.zeros(1, 1, 2, **DOUBLE)), k)


def minimax(layer, layers=4, heads=4):
    config = MiniMaxConfig(
        hidden_size=16, num_attention_heads=heads, head_dim=4, num_hidden_layers=layers, block_size=8, hidden_act="silu"
    )
    return MiniMaxLightningAttention(config, layer).double().eval()


@pytest.mark.parametrize("layer", [0, 3])
def test_the_tables_are_the_published_ones(layer):
    module = minimax(layer)
    torch.testing.assert_close(lightning_decay(4, layer, 4, "alibi"), -module.get_slope_rate().flatten().float())
    heads = torch.arange(6)
    torch.testing.assert_close(lightning_decay(6, layer, 4, "paper"), -8 * heads / 6 * (1 - layer / 4))
    slopes = build_alibi_tensor(torch.ones(1, 2), 12, torch.float32)[:, 0, 1]  # position 1 times the slope
    torch.testing.assert_close(lightning_decay(12, 0, 4, "alibi"), -slopes * (1 + 1e-5))


def test_lightning_attention_is_that_of_minimax():
    module, hidden, found = minimax(1), torch.randn(2, 21, 16, **DOUBLE), []
    module.norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        module(hidden, None, None)
        qkv = torch.nn.functional.silu(module.qkv_proj(hidden)).reshape(2, 21, 4, 12).transpose(1, 2)
        q, k, v = qkv.split(4, -1)
        out = linear_attention(q, k, v, log_decay=-module.slope_rate.flatten(), scale=1.0)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), found[0].reshape(2, 21, 16), rtol=0, atol=1e-6)


def test_what_runs_where():
    call = Call(torch.device("cpu"), torch.float32, more={"decay": "token", "causal": True, "chunk": 64})
    choice = explain(call)
    assert choice.chosen == "chunk" and set(choice.others) == {"triton", "reference"}
    triton = IMPLEMENTATIONS[0]
    for change, reason in (({"decay": "channel"}, "per channel"), ({"causal": False}, "order"), ({"chunk": 48}, "48")):
        assert reason in triton.blocked(Call(torch.device("cpu"), torch.float32, more={**call.more, **change}))


@pytest.mark.bad_shape
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": torch.tensor([0.1, -1.0])}, "log_decay must be 0 or less, and never nan; found 0.1"),
        ({"log_decay": torch.full((1, 2, 4), torch.nan)}, "log_decay must be 0 or less, and never nan; found nan"),
        ({"log_decay": torch.zeros(4, 2)}, r"log_decay must have one of the shapes \(2,\).* found \(4, 2\)"),
        ({"log_decay": torch.zeros(1, 2, 5)}, r"log_decay must have shape \(1, 2, 4\); found \(1, 2, 5\)"),
        ({"log_decay": torch.zeros(2), "causal": False}, "log_decay must be None without causal"),
        ({"log_decay": torch.zeros(2, dtype=torch.int)}, "log_decay must be floating"),
        ({"feature": "relu"}, "feature must be one of identity.* found 'relu'"),
        ({"chunk": 0}, "chunk must be 1 or more; found 0"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)}, "the same length; found 4, 5"),
        ({"k": torch.zeros(1, 3, 4, 8), "v": torch.zeros(1, 3, 4, 8)}, "multiple of key heads; found 2, 3"),
        ({"q": torch.zeros(2, 4, 8)}, r"q must be \[batch, heads, length, dim\]"),
        ({"valid": torch.ones(1, 3, dtype=torch.bool)}, r"valid must have shape \(1, 4\); found \(1, 3\)"),
        ({"valid": torch.ones(1, 4)}, "valid must be bool"),
        ({"documents": torch.tensor([[0, 0, -1, 0]])}, "documents must be 0 or more; found -1..0"),
        ({"initial_state": torch.zeros(1, 2, 8, 7)}, r"initial_state must have shape \(1, 2, 8, 8\)"),
        ({"initial_state": torch.zeros(1, 2, 8, 8), "normalize": True}, "must be a pair .* found a Tensor"),
        ({"initial_state": (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8))}, "must be a tensor; found a tuple"),
        ({"impl": "fla"}, "impl must be one of"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {name: change.pop(name, torch.zeros(1, 2, 4, 8)) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=f"{NAME}: .*{message}"):
        linear_attention(**inputs, **change)


@pytest.mark.bad_shape
def test_bad_input_of_the_tables_and_of_a_step_is_named():
    with pytest.raises(ValueError, match="table must be one of paper, alibi; found 'flash'"):
        lightning_decay(4, 0, 4, "flash")
    with pytest.raises(ValueError, match=r"layer 0\.\.3; found 4 heads, layer 4"):
        lightning_decay(4, 4, 4, "paper")
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"linear_attention_step: q must be \[batch, heads, dim\]"):
        linear_attention_step(x, x, x, None)
