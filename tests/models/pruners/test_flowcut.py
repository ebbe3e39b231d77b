"""FlowCut in a model against its loop written out, inside the encoder and inside the language model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import check, llm_before, vit_after
from vlm.models.program.signals import Attention, VisualFlow
from vlm.models.pruners.flowcut import Flowcut


def score_of(seen: Any, similarity: str) -> Tensor:
    """A block's score of each patch of one image."""
    attention = seen.attention[0, :, 0, 1:].mean(0)
    own, others = seen.v[0, :, :1], seen.v[0, :, 1:]
    if similarity == "softmax":
        alike = (seen.v[0] @ own.transpose(1, 2)).softmax(1).mean(0)[1:, 0]
    else:
        alike = torch.nn.functional.cosine_similarity(own, others, dim=-1).clamp_min(0).mean(0)
    return (attention / attention.sum() + alike / alike.sum()) * others.mean(0).abs().sum(1)


@torch.no_grad()
def by_hand(model: Any, by_eye: Any, image: Tensor, keep: int, **options: Any) -> tuple[list[int], Tensor, list[int]]:
    """Places, features and the number of patches after each block of one image."""
    entered: list[Tensor] = []
    handle = model.vision.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model.vision(image[None])
    handle.remove()
    x, place, total, counts = entered[0], list(range(36)), None, []
    prefix = x.shape[1] - 36
    last = len(model.vision.blocks) - 1
    for number, block in enumerate(model.vision.blocks):
        seen = by_eye.attend(block, x)
        x = block(x)
        if prefix:
            score, row = score_of(seen, options.get("similarity", "softmax")), seen.attention[0, :, 0, 1:].mean(0)
        else:
            query = seen.q[0].mean(1, keepdim=True)
            row = (query @ seen.k[0].transpose(1, 2) * query.shape[2] ** -0.5).softmax(-1)[:, 0].mean(0)
            score = row * seen.v[0].mean(0).abs().sum(1)
        recent = options.get("recent", 0.5)
        total = score if total is None else (1 - recent) * total + recent * score
        left = last - 1 - number  # blocks until the one before the output
        if left >= 0 and left % 2 == 0:
            share = row / row.sum()
            rho = float(-(share * share.log()).sum()) / math.log(len(place))
            excess = len(place) - keep
            remove = excess if left == 0 else round(excess / math.sqrt(left) * (1 - rho**2))
            kept = sorted(by_eye.best(total, len(place) - min(remove, excess)))
            x = torch.cat([x[:, :prefix], x[:, prefix:][:, kept]], 1)
            place, total = [place[i] for i in kept], total[kept]
        counts.append(len(place))
    return place, model.vision.model.norm(x)[0, prefix:], counts


@pytest.mark.parametrize(
    ("keep", "options"),
    [(9, {}), (5, {"recent": 0.3}), (9, {"similarity": "cosine"})],
)
@pytest.mark.parametrize(("blocks", "class_token"), [(4, True), (7, True), (6, False)])
def test_equals_its_loop_written_out(clear, batch, by_eye, keep, options, blocks, class_token):
    model, inputs = clear(blocks=blocks, class_token=class_token), batch("t#t#", "#t")
    layouts: list[Any] = []
    with torch.no_grad(), attach(model, Flowcut(Budget(tokens=keep), **options).program(model.facts)):
        features = by_eye.handed_over(model, lambda: layouts.append(model(inputs).layout))
    traces = []
    for n in range(3):
        places, expected, counts = by_hand(model, by_eye, inputs.images[n], keep, **options)
        assert by_eye.places(layouts[0], n) == places and len(places) == keep
        torch.testing.assert_close(features[n], expected, rtol=0, atol=1e-9)
        traces.append(counts)
    assert traces[0] != traces[1] or traces[1] != traces[2]  # each image goes its own way
    assert any(36 > count > keep for trace in traces for count in trace)


def test_cuts_stand_where_the_code_has_them(clear):
    facts = clear().facts
    big = facts._replace(vision=facts.vision._replace(depth=24, blocks=23, output=22), visual=576)
    program = Flowcut(Budget(tokens=64)).program(big)
    assert [site for site, _ in program] == [vit_after(block) for block in range(1, 22, 2)]
    assert [op.exact for _, op in program] == [False] * 10 + [True]
    for form, more, first in (("next", 160, 1), ("qwen", 128, 0)):
        *inside, (site, last) = Flowcut(Budget(tokens=64), form=form).program(big)
        assert {op.keep.tokens for _, op in inside} == {more}
        assert [site for site, _ in inside] == [vit_after(block) for block in range(first, 23, 2)]  # 22 is the last
        assert site == llm_before(2) and last.keep.tokens == 64 and last.selector.needs == (VisualFlow(1),)


def flow_to_last(q: Tensor, k: Tensor, v: Tensor, visual: list[int], row: int) -> Tensor:
    """Score of each visual token: q [heads, n, dim], k and v [kv heads, n, dim] of the whole sequence."""
    scale = q.shape[2] ** -0.5
    repeat = q.shape[0] // k.shape[0]
    k, wide = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    attention = (q[:, row, None] @ k[:, visual].transpose(1, 2) * scale).softmax(-1)[:, 0].mean(0)
    alike = (wide[:, row, None] @ wide[:, visual].transpose(1, 2) * scale).softmax(-1)[:, 0].mean(0)
    return (attention + alike) * v.mean(0)[visual].abs().sum(1)


def test_flow_in_the_language_model_by_definition(make_model, batch):
    g = torch.Generator().manual_seed(0)
    model, inputs = make_model(), batch("t#tt", "tttt")
    with torch.no_grad():
        layout = model(inputs).layout  # the second row has no image
    n = layout.role.shape[1]
    q = torch.randn(2, 4, n, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, n, 8, generator=g, dtype=torch.float64)
    visual = layout.visual[0].nonzero().flatten().tolist()
    common: Any = {"key_valid": layout.valid, "scale": None, "validate": False}
    found = VisualFlow(1).read(Attention(q, k, v, layout.valid, common, "auto", layout))
    expected = torch.zeros(n, dtype=torch.float64)
    expected[visual] = flow_to_last(q[0], k[0], v[0], visual, n - 1)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert not found[1].any()
    # in training: the mean over the rows before the answers; what comes later than a row does not flow to it
    asks = torch.tensor([[visual[10], n - 1], [2, -1]])
    found = VisualFlow(1).read(Attention(q, k, v, layout.valid, common, "auto", layout, asks))
    expected[visual] /= 2
    expected[visual[:11]] += flow_to_last(q[0], k[0], v[0], visual[:11], visual[10]) / 2
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(("form", "more"), [("next", 10), ("qwen", 8)])
def test_the_second_cut_goes_by_flow_to_the_last_row(clear, batch, by_eye, form, more):
    model, inputs = clear(), batch("tt#tt")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    attention = model.decoder.layers[1].self_attn
    with torch.no_grad():
        *inside, _ = program = Flowcut(Budget(tokens=4), form=form).program(model.facts)
        with attach(model, (*inside,)):
            first = model(inputs).layout

            def spy(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
                x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
                q, k, v = (
                    f(x).unflatten(2, (-1, 8)).transpose(1, 2)[0] for f in (module.q_proj, module.k_proj, module.v_proj)
                )
                turn = lambda t: t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin  # noqa: E731
                seen.append((turn(q[None])[0], turn(k[None])[0], v))

            handle = attention.register_forward_pre_hook(spy, with_kwargs=True)
            model(inputs)
            handle.remove()
        with attach(model, program):
            out, (_, stream) = model(inputs), model.prefill(inputs)
    visual = first.visual[0].nonzero().flatten().tolist()
    score = flow_to_last(*seen[0], visual, first.role.shape[1] - 1)
    before = by_eye.places(first, 0)
    assert by_eye.places(out.layout, 0) == [before[i] for i in sorted(by_eye.best(score, 4))]
    assert stream.run.visual_tokens(4) == [more, more, 4, 4]


@pytest.mark.parametrize("form", ["next", "qwen"])
def test_a_sample_of_the_second_cut_is_the_same_alone_and_in_a_batch(clear, batch, alone, by_eye, form):
    model, inputs = clear(), batch("tt#ttt", "t#t#tt", "tttt")
    with torch.no_grad(), attach(model, Flowcut(Budget.parse("20%"), form=form).program(model.facts)):
        together = model(inputs)
        assert together.layout.visual.sum(1).tolist() == [7, 14, 0]
        for b in range(3):
            single = model(alone(inputs, b))
            own = together.hidden[b][together.layout.valid[b]]
            torch.testing.assert_close(own, single.hidden[0], rtol=0, atol=1e-9)


def test_bad_input(clear):
    facts = clear().facts
    with pytest.raises(ModelError) as error:
        Flowcut(Budget(tokens=9)).program(facts._replace(vision=None, refuses={"vit.out": "hidden here"}))
    assert str(error.value) == "flowcut: hidden here"
    small = clear(layers=2)
    with pytest.raises(ModelError) as error, attach(small, Flowcut(Budget(tokens=9), form="next").program(small.facts)):
        pass
    assert str(error.value) == "llm.before[2]: the language model has layers 1..1; found 2"
    rotary = facts._replace(vision=facts.vision._replace(cuts="dinov3_vit gives its blocks rotary positions"))
    with pytest.raises(ModelError) as error:
        check(Flowcut(Budget(tokens=9)).program(facts), rotary)
    expected = "vit.after[0]: tokens cannot go inside this vision encoder: dinov3_vit gives its blocks rotary positions"
    assert str(error.value) == expected
