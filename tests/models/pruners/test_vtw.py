"""VTW against a decoder that goes on with the text alone."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.calibrate import first_safe_layer
from vlm.models.program.decode import generate
from vlm.models.program.program import Select
from vlm.models.pruners.vtw import Vtw


def withdraw(image_of, layer):
    def cut(number, place, attention):
        if number != layer:
            return None
        return torch.tensor([i for i, p in enumerate(place.tolist()) if p >= len(image_of) or image_of[p] < 0])

    return cut


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("position", ["keep", "reindex"])
def test_vtw_equals_going_on_with_the_text(make_model, batch, spliced, by_hand, kind, layer, position):
    model, inputs = make_model(kind), batch("tt#ttt", "t#t#t", "tttt")
    more = torch.randint(0, 40, (3, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, Vtw(layer=layer, position=position).program(model.facts)):
        out, (logits, stream) = model(inputs), model.prefill(inputs)
        assert not bool(out.layout.visual.any())
        assert stream.run.visual_tokens(4) == [36.0] * layer + [0.0] * (4 - layer)
        for b in range(3):
            x, image_of, _ = spliced(model, inputs, b)
            expected = by_hand(model, x, cut=withdraw(image_of, layer), reindex=position == "reindex")
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)
        for step in range(3):
            logits = model.step(stream, more[:, step])
        for b in range(3):
            x, image_of, _ = spliced(model, inputs, b)
            x = torch.cat([x, model.language.get_input_embeddings()(more[b])])
            expected = by_hand(model, x, cut=withdraw(image_of, layer), reindex=position == "reindex")
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)


def test_a_prompt_that_ends_with_its_image_keeps_the_token_that_asks(make_model, batch, spliced, by_hand):
    model, inputs = make_model(), batch("tt#", "t#tt")
    with torch.no_grad(), attach(model, Vtw(layer=2).program(model.facts)):
        logits, stream = model.prefill(inputs)
        assert stream.run.last.visual.sum(1).tolist() == [1, 0]
        x, image_of, _ = spliced(model, inputs)
        image_of[-1] = -1
        expected = by_hand(model, x, cut=withdraw(image_of, 2))
        torch.testing.assert_close(logits[0], expected[-1], rtol=0, atol=1e-9)
        assert len(generate(model, inputs, max_new_tokens=3, stop=99)[0]) == 3


def layer_of(facts, **options):
    ((site, op),) = Vtw(**options).program(facts)
    assert isinstance(op, Select)
    assert op.keep.of(576) == 0
    return site.layer


def test_a_budget_says_the_layer(make_model):
    facts = make_model().facts
    assert facts.shape is not None
    shape = facts.shape.__class__(**{**vars(facts.shape), "layers": 32, "width": 4096, "mlp": 11008})
    facts = facts._replace(layers=32, visual=576, shape=shape)
    assert layer_of(facts) == 15
    assert layer_of(facts, keep=Budget.parse({"average": 288})) == 16
    assert layer_of(facts, keep=Budget.parse({"average": "50%"})) == 16
    assert layer_of(facts, keep=Budget.parse({"kv_bytes": "55%"})) == 16  # (16 576 + 32 64) / (32 640) is 55 %
    assert layer_of(facts, keep=Budget.parse({"average": "1%"})) == 1
    assert Vtw(keep=Budget.parse("100%")).program(facts) == ()
    for keep in ("25%", 64, {"after_layer": 64}):
        with pytest.raises(ModelError, match="no visual token is left at the end; expected average, flops or kv_bytes"):
            Vtw(keep=Budget.parse(keep)).program(facts)
    with pytest.raises(ModelError, match="expected a layer or a budget; found layer 3 and keep average 50%"):
        Vtw(keep=Budget.parse({"average": "50%"}), layer=3).program(facts)
    with pytest.raises(ModelError, match="expected a share, since images differ"):
        Vtw(keep=Budget.parse({"average": 50})).program(facts._replace(visual=None))


def test_the_first_safe_layer_is_the_first_of_small_divergence(make_model, batch, spliced, by_hand):
    model, batches = make_model(), [batch("tt#ttt", "#t"), batch("t#tt")]
    expected = {}
    with torch.no_grad():
        for layer in (1, 2, 3):
            each = []
            for inputs in batches:
                for b in range(len(inputs.tokens)):
                    x, image_of, _ = spliced(model, inputs, b)
                    p = by_hand(model, x, cut=withdraw(image_of, layer))[-1].softmax(-1)
                    q = by_hand(model, x)[-1].softmax(-1)
                    each.append(float((p * (p / q).log()).sum()))
            expected[layer] = sum(each) / len(each)
    at = lambda layer: Vtw(layer=layer).program(model.facts)  # noqa: E731
    most = min(expected.values()) * 1.001
    layer, tried = first_safe_layer(model, batches, at, most, layers=(1, 2, 3))
    assert layer == min(expected, key=lambda n: expected[n])
    assert tried == pytest.approx({n: expected[n] for n in tried}, rel=1e-4)
    with pytest.raises(ModelError, match="no layer with a divergence of at most 0; the least is"):
        first_safe_layer(model, batches, at, 0.0, layers=(1, 2))
