"""Mitigators on attention against their definitions written out on dense matrices, in double precision."""

import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm.kernels.grouped_mass.rules import visual_redistribution
from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.kv.snapkv import Snapkv
from vlm.models.mitigators.act import Act
from vlm.models.mitigators.hgai import Hgai
from vlm.models.mitigators.pai import Pai
from vlm.models.mitigators.pai_cfg import Paicfg
from vlm.models.mitigators.paint import Paint
from vlm.models.mitigators.var import Var
from vlm.models.mitigators.zerotuning import Zerotuning
from vlm.models.program import keys
from vlm.models.program.attach import attach, check
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.inside import mixed, row_scores
from vlm.models.program.keys import Keys
from vlm.models.program.patches import outliers, top_share
from vlm.models.program.program import Regroup, Rescore, attn
from vlm.models.program.rescore import raised, raised_together
from vlm.models.program.streams import Streams, open_streams
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.visionzip import Visionzip

QUARTER = Budget.parse("25%")
ROWS = ("tt#ttt", "t#t#", "ttt", "#tttttt")  # two images, an image at the end, none, and one that begins
CLASS_TOKEN: dict[str, Any] = {"class_token": True, "blocks": 4}
ACTIVE: dict[str, Any] = {
    "pai": Pai(alpha=0.8),
    "pai everywhere": Pai(alpha=-0.4, layers=(0, 3)),
    "hgai": Hgai(alpha=0.9, layers=(1, 2)),
    "paint": Paint(alpha=0.9, beta=-0.6, local=0.4),
    "zerotuning": Zerotuning(gamma=3.0),
    "zerotuning in all rows": Zerotuning(gamma=0.2, layers=(1, 3), rows="all"),
    "act": Act(beta=0.2, threshold=0.15, calibration=None, layers=(0, 3)),
    "act in all rows": Act(beta=0.4, threshold=1.5, scaled=True, calibration=None, layers=(1, 2), rows="all"),
}
NEUTRAL = [Pai(alpha=0.0), Hgai(alpha=0.0), Paint(alpha=0.0, beta=0.0), Zerotuning(gamma=1.0)]
NEUTRAL += [Act(beta=1.0, calibration=None)]


def paint_gains(model: Any, pixels: Tensor, method: Paint) -> Tensor:
    """The definition for one image: its patches' gains, from attention matrices of the encoder's own weights."""
    encoder, rows = model.vision.model, []
    x = encoder.patch_embed(pixels[None])
    x = encoder.norm_pre(encoder.patch_drop(encoder._pos_embed(x)))
    for block in encoder.blocks:
        a = block.attn
        q, k, _ = a.qkv(block.norm1(x)).unflatten(2, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rows.append((q @ k.transpose(2, 3) * a.scale).softmax(-1)[0, :, 0, 1:].sum(0))
        x = block(x)
    local_row, summary_row = rows[0], rows[-2]
    q1, q3 = numpy.percentile(summary_row.numpy(), [25, 75])
    summary = summary_row > q3 + 1.5 * (q3 - q1)
    local = torch.zeros_like(summary)
    local[local_row.argsort(descending=True)[: math.floor(method.local * len(local_row))]] = True
    gains = torch.zeros_like(local_row)
    gains[summary] = method.beta
    gains[local & ~summary] = method.alpha
    return gains


def dense_edits(model: Any, method: Any, image_of: Tensor, images: list[Tensor]) -> dict[str, Any]:
    """What a method does to a sequence whose prompt is ``image_of`` long, as arguments of the dense decoder."""
    prompt, image = len(image_of), image_of >= 0
    newest = prompt - 1
    first = 0 if getattr(method, "rows", "") == "all" else int(image.nonzero().max()) + 1 if image.any() else 999
    span = method.layers or ((0, 3) if isinstance(method, Zerotuning) else (2, 3))

    def scores(layer: int, row: int, z: Tensor) -> Tensor:
        if not span[0] <= layer <= span[1] or row < newest or not isinstance(method, Pai | Hgai | Paint):
            return z
        z, at = z.clone(), image.nonzero().flatten()
        if isinstance(method, Pai):
            z[:, at] += method.alpha * z[:, at].abs()
        elif isinstance(method, Hgai):
            z[:, at] += method.alpha * z[:, at].abs().mean(0)
        elif len(images):
            z[:, at] += torch.cat([paint_gains(model, pixels, method) for pixels in images]) * z[:, at].abs()
        return z

    def weights(layer: int, attention: Tensor) -> Tensor:
        return dense_weights(method, attention.clone(), prompt, first) if span[0] <= layer <= span[1] else attention

    return {"scores": scores, "weights": weights}


def dense_weights(method: Any, attention: Tensor, prompt: int, first: int) -> Tensor:
    """What a method makes of attention matrices [heads, n, n] from row ``first`` on."""
    if isinstance(method, Zerotuning):
        for row in range(first, attention.shape[1]):
            a0 = attention[:, row, :1].clone()
            attention[:, row] /= (method.gamma - 1) * a0 + 1
            attention[:, row, :1] = method.gamma * a0 / ((method.gamma - 1) * a0 + 1)
    elif isinstance(method, Act):
        for alpha in attention:
            mean = alpha[:prompt, :prompt].sum(0) / (prompt - torch.arange(prompt))
            limit = method.threshold / prompt if method.scaled else method.threshold
            sinks = (mean > limit).nonzero().flatten()[1:]
            rest = torch.ones(alpha.shape[1], dtype=torch.bool)
            rest[sinks] = False
            for row in range(max(first, 1), len(alpha)):
                freed = (1 - method.beta) * alpha[row, sinks].sum()
                alpha[row, sinks] *= method.beta
                alpha[row, rest] += freed * alpha[row, rest] / alpha[row, rest].sum()
    return attention


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_its_definition_in_the_prompt_and_at_every_token(make_model, batch, spliced, dense, name, kv_heads):
    model, inputs, method = make_model(kv_heads=kv_heads, **CLASS_TOKEN), batch(*ROWS), ACTIVE[name]
    more = torch.randint(0, 40, (4, 3))
    changed = 0.0
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out = model(inputs)  # padded on the right
        logits, stream = model.prefill(inputs)  # on the left
        for step in range(3):
            for b in range(4):
                x, image_of, _ = spliced(model, inputs, b)
                images = [inputs.images[i] for i in range(len(inputs.images)) if inputs.owner[i] == b]
                x = torch.cat([x, model.language.get_input_embeddings()(more[b, :step])])
                expected = dense(model, x, **dense_edits(model, method, image_of, images))
                torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-6)
                if step == 0:
                    got = model.logits(out.hidden[b][out.layout.valid[b]])
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
                plain = dense(model, x)[-1]
                changed = max(changed, float((plain - expected[-1]).abs().max()))
                if "#" not in ROWS[b] and getattr(method, "rows", "") != "all":
                    torch.testing.assert_close(logits[b], plain, rtol=0, atol=1e-6)
            logits = model.step(stream, more[:, step])
    assert changed > 1e-3


@pytest.mark.parametrize("method", NEUTRAL, ids=repr)
def test_a_neutral_setting_is_the_empty_program(make_model, method):
    assert method.program(make_model(**CLASS_TOKEN).facts) == ()


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("pruner", [None, Fastv(QUARTER), Visionzip(QUARTER)], ids=["whole", "fastv", "visionzip"])
def test_beams_of_a_padded_batch_equal_single_samples(make_model, batch, alone, name, pruner):
    model, inputs = make_model(**CLASS_TOKEN), batch(*ROWS, side="left")
    cut = pruner.program(model.facts) if pruner else ()
    options: Any = {"max_new_tokens": 4, "stop": 11, "decoder": Beam(2)}
    with attach(model, cut + ACTIVE[name].program(model.facts)), torch.no_grad():
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(4)]
        logits = model.prefill(inputs)[0]
    with attach(model, cut), torch.no_grad():
        assert (model.prefill(inputs)[0] - logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", ACTIVE)
def test_what_an_answer_remembers_grows_goes_back_and_follows_its_rows(monkeypatch, make_model, batch, name):
    model, inputs = make_model(**CLASS_TOKEN), batch(*ROWS, side="left")
    texts = torch.arange(4 * 4).reshape(4, 4)
    with attach(model, ACTIVE[name].program(model.facts)), torch.no_grad():
        prompts = open_streams(model, inputs)
        monkeypatch.setattr(keys, "AHEAD", 1)
        streams = Streams(model, *prompts, remember=True).take_rows(torch.arange(4))
        for tokens in texts.flip(0).unbind(1):
            streams.step(tokens)
        streams.rewind(torch.cat([texts.flip(0)[:, :1], texts[:, 1:3]], 1))
        streams.reorder(torch.tensor([2, 0, 0, 3]))
        streams.step(texts[:, 3])
        monkeypatch.undo()
        for row, source in enumerate([2, 0, 0, 3]):
            fresh = Streams(model, *prompts).take_rows(torch.tensor([source]))
            for token in (texts[3 - source, 0], texts[source, 1], texts[source, 2], texts[row, 3]):
                fresh.step(token[None])
            torch.testing.assert_close(streams.logits["main"][row], fresh.logits["main"][0], rtol=0, atol=1e-9)


def test_groups_are_asked_for_a_prompt_and_once_for_its_answer(make_model, batch):
    model, asked = make_model(), []

    def groups(seen: Keys) -> Tensor:
        asked.append(seen.layout.role.shape[1])
        return seen.visual.long()

    op = Regroup(groups, visual_redistribution())
    with attach(model, ((attn(1), op),)), torch.no_grad():
        _, stream = model.prefill(batch("t#tt"))
        length = stream.run.layouts[0].role.shape[1]
        for token in range(4):
            model.step(stream, torch.tensor([token]))
    assert asked == [length, length + 1]


@pytest.mark.parametrize("name", ["pai", "paint", "act"])
def test_beams_equal_a_search_that_keeps_no_cache(make_model, batch, name):
    model, inputs = make_model(**CLASS_TOKEN), batch("tt#ttt")
    with attach(model, ACTIVE[name].program(model.facts)), torch.no_grad():
        (answer,) = generate(model, inputs, max_new_tokens=4, stop=99, decoder=Beam(2))
        hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(4):
            found = []
            for score, tokens in hypotheses:
                logits, stream = model.prefill(inputs)
                for token in tokens:
                    logits = model.step(stream, torch.tensor([token]))
                likely = logits[0].log_softmax(-1)
                found += [(score + float(likely[t]), [*tokens, t]) for t in range(40)]
            hypotheses = sorted(found, reverse=True)[:2]
    assert answer == hypotheses[0][1]


def test_paint_raises_only_what_a_pruner_in_the_encoder_left(make_model, batch):
    model, inputs, method = make_model(**CLASS_TOKEN), batch("tt#ttt", "t#t#"), ACTIVE["paint"]
    program = method.program(model.facts)
    (signal,) = program[0][1].needs
    with attach(model, Visionzip(QUARTER, contextual=0.0).program(model.facts) + program), torch.no_grad():
        _, stream = model.prefill(inputs)
        layout, got = stream.run.layouts[0], stream.run.get(signal, 2)
    kept = 0
    for image, pixels in enumerate(inputs.images):
        with torch.no_grad():
            expected = paint_gains(model, pixels, method)
        for b, place in (layout.image == image).nonzero().tolist():
            cell = int(layout.row[b, place] * 6 + layout.col[b, place])
            torch.testing.assert_close(got[b, place], expected[cell])
            kept += 1
    assert kept == 27
    assert bool((got[~layout.visual] == 0).all()) and len(got.unique()) > 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(1, 9))
def test_rows_and_maps_equal_loops(seed, batch_size, head_counts, length):
    g = torch.Generator().manual_seed(seed)
    heads, kv_heads = head_counts
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = (
        draw(batch_size, heads, 1, 4),
        draw(batch_size, kv_heads, length, 4),
        draw(batch_size, kv_heads, length, 5),
    )
    visible = torch.rand(batch_size, length, generator=g) < 0.7
    visible[:, -1] = True
    image = (torch.rand(batch_size, length, generator=g) < 0.5) & visible  # may be none
    z = row_scores(q, k, visible[:, None])[:, :, 0]
    up, together = raised(z, 0.7 * image[:, None]), raised_together(z, 0.7, image)
    out = mixed(up.softmax(-1)[:, :, None], v)[:, :, 0]
    for b in range(batch_size):
        there = visible[b].nonzero().flatten().tolist()
        plain = {(h, j): float(q[b, h, 0] @ k[b, h * kv_heads // heads, j]) / 2 for h in range(heads) for j in there}
        for h in range(heads):
            total, mix = 0.0, torch.zeros(5, dtype=torch.float64)
            for j in there:
                s, own = plain[h, j], bool(image[b, j])
                mean = sum(abs(plain[g2, j]) for g2 in range(heads)) / heads
                assert float(z[b, h, j]) == pytest.approx(s, abs=1e-12)
                assert float(together[b, h, j]) == pytest.approx(s + 0.7 * own * mean, abs=1e-12)
                weight = math.exp(s + 0.7 * own * abs(s))
                total, mix = total + weight, mix + weight * v[b, h * kv_heads // heads, j]
            torch.testing.assert_close(out[b, h], mix / total)
        hidden = [j for j in range(length) if j not in there]
        assert bool(up[b, :, hidden].isneginf().all()) and bool(together[b, :, hidden].isneginf().all())


def test_outliers_and_shares():
    score = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 30], [1.0, 1, 1, 1, 1, 1, 1, 1]])
    assert outliers(score).tolist() == [[False] * 7 + [True], [False] * 8]
    assert top_share(score, 0.3).nonzero().tolist() == [[0, 6], [0, 7], [1, 0], [1, 1]]


def test_a_text_that_is_learned_has_no_newest_row(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt")
    weights = torch.tensor([[0.0, 0, 0, 0, 1, 1]])
    with attach(model, Pai().program(model.facts)), pytest.raises(ModelError, match="which training does not have"):
        model(inputs, weights)
    with attach(model, Zerotuning(gamma=2.0).program(model.facts)):  # rows after the image have it in training too
        model(inputs, weights).loss.backward()
    assert model.decoder.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("second", [Hgai(layers=(2, 2)), Var(skip_last=False), Zerotuning()], ids=repr)
def test_two_methods_on_one_layer_are_refused(make_model, second):
    facts = make_model().facts
    with pytest.raises(ModelError, match=r"attn\[\d\]: 2 methods change the attention weights of this layer"):
        check(Pai().program(facts) + second.program(facts), facts)
    check(Pai(layers=(0, 1)).program(facts) + Hgai(layers=(2, 2)).program(facts), facts)
    check(Pai().program(facts) + Paicfg().program(facts), facts)


def test_a_cache_policy_of_each_head_is_refused(make_model):
    facts = make_model().facts
    with pytest.raises(ModelError, match="kv: each head keeps entries of its own"):
        check(Pai().program(facts) + Snapkv(QUARTER).program(facts), facts)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Pai(layers=(1, 4)), r"pai.layers: expected first and last of 0..3; found 1, 4"),
        (Hgai(layers=(2, 1)), r"hgai.layers: expected first and last of 0..3; found 2, 1"),
        (Paint(local=2.0), r"paint.local: expected a share from 0 to 1; found 2"),
        (Zerotuning(gamma=-1.0), r"zerotuning.gamma: expected a factor of 0 or more; found -1"),
        (Act(beta=1.5, calibration=None), r"act.beta: expected a share from 0 to 1; found 1.5"),
        (Act(), r"act.calibration: auto belongs to a model of a recipe; give the path of a file"),
    ],
)
def test_what_makes_no_sense_is_refused(make_model, method, message):
    with pytest.raises(ModelError, match=message):
        method.program(make_model(**CLASS_TOKEN).facts)


def test_paint_says_what_it_needs_of_the_encoder(make_model):
    with pytest.raises(ModelError, match="this vision encoder has no class token; set attention: received"):
        Paint().program(make_model(blocks=4).facts)
    assert Paint(attention="received").program(make_model(blocks=4).facts)


def test_the_layers_of_a_model_of_32(make_model):
    facts = make_model(**CLASS_TOKEN).facts._replace(layers=32)
    layers = lambda method: [site.layer for site, _ in method.program(facts)]  # noqa: E731
    assert layers(Pai()) == layers(Paint()) == list(range(2, 32))
    assert layers(Hgai()) == list(range(5, 19))
    assert layers(Act(calibration=None)) == list(range(2, 31))
    assert layers(Zerotuning()) == list(range(32))
    ops = {type(op) for method in (Pai(), Hgai(), Paint()) for _, op in method.program(facts)}
    assert ops == {Rescore}
    assert {type(op) for _, op in Act(calibration=None).program(facts)} == {Regroup}
