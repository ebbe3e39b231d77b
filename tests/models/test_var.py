"""VAR inside a real model against the procedure of the paper on dense attention matrices, row by row."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.mitigators.var import Var
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.signals import Facts
from vlm.models.pruners.fastv import Fastv


def dense_var(image_of, method, layers=4):
    """The paper's steps A, B, C in loops. Returns the edit and a list of what it did, one entry per changed row."""
    prompt, done = len(image_of), []
    image_of = torch.cat([image_of, torch.full((99,), -1)])  # what is generated is text
    moved = method.taken if method.semantics == "paper" else 1 - method.taken

    def edit(layer, x, place, attention):
        if layer < 2 or (method.skip_last and layer == layers - 1):
            return attention
        normed = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()
        phi = normed[:, list(method.dims)].amax(-1) if method.dims else normed.amax(-1)
        sink, image = (phi > method.tau) & (place < prompt), image_of[place] >= 0
        visual, visual_sink = image & ~sink, image & sink
        attention = attention.clone()
        for row in range(len(place)):
            if not image.any() or row <= int(image.nonzero().max()):
                continue
            for alpha in attention[:, row]:
                of_image, of_visual_sink = alpha[image].sum(), alpha[visual_sink].sum()
                useful = of_image - of_visual_sink
                if not visual_sink.any() or of_image < method.image_min or useful < method.rho * of_image:
                    continue
                omega = moved * alpha[sink].sum()
                alpha[visual] *= 1 + omega / useful
                alpha[sink] *= 1 - moved
                torch.testing.assert_close(alpha.sum().item(), 1.0)
                done.append((layer, bool((sink & ~image).any())))
        return attention

    return edit, done


METHODS = {
    "default": Var(tau=2.3),
    "with the last layer": Var(tau=2.3, skip_last=False),
    "the code's reading of p": Var(tau=2.3, semantics="code"),
    "all heads": Var(tau=2.3, rho=0.0, image_min=0.0),
    "strict": Var(tau=2.4, rho=0.6, image_min=0.4),
    "two dimensions": Var(tau=1.5, dims=(3, 17), rho=0.1),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_the_dense_procedure_in_prefill_and_decoding(make_model, batch, spliced, by_hand, name, kv_heads):
    # rows of different length, two images, an image at the end: left padding in prefill, right padding in training
    model, inputs, method = make_model(kv_heads=kv_heads), batch("tt#ttt", "t#t#", "tt", "#ttttt"), METHODS[name]
    more = torch.randint(0, 40, (4, 3))
    changed = []
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out = model(inputs)
        logits, stream = model.prefill(inputs)
        for step in range(4):
            for b in range(4):
                x, image_of, _ = spliced(model, inputs, b)
                edit, done = dense_var(image_of, method)
                x = torch.cat([x, model.language.get_input_embeddings()(more[b, :step])])
                expected = by_hand(model, x, edit=edit)
                torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-6)
                if step == 0:
                    got = model.logits(out.hidden[b][out.layout.valid[b]])
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
                changed += done
            if step < 3:
                logits = model.step(stream, more[:, step])
    assert {layer for layer, _ in changed} == ({2} if method.skip_last else {2, 3})
    assert {with_text_sink for _, with_text_sink in changed} >= {True}


def test_an_image_that_fastv_has_cut(make_model, batch, spliced, by_hand):
    model, inputs, method = make_model(), batch("tt#ttt", "t#t#tt"), Var(tau=2.4, rho=0.0)
    program = Fastv(Budget.parse("50%")).program(model.facts) + method.program(model.facts)
    more = torch.randint(0, 40, (2, 3))
    changed = []
    with torch.no_grad(), attach(model, program):
        logits, stream = model.prefill(inputs)
        for step in range(3):
            for b in range(2):
                x, image_of, _ = spliced(model, inputs, b)
                prompt = len(x)

                def cut(layer, place, attention, image_of=image_of, prompt=prompt):
                    if layer != 2:
                        return None
                    score = attention[:, prompt - 1].mean(0)[:prompt].masked_fill(image_of < 0, -1)
                    kept = score.argsort(descending=True, stable=True)[: int((image_of >= 0).sum()) // 2]
                    rest = torch.cat([image_of < 0, torch.ones(len(place) - prompt, dtype=torch.bool)])
                    return torch.cat([kept, rest.nonzero().flatten()]).sort().values

                edit, done = dense_var(image_of, method)
                x = torch.cat([x, model.language.get_input_embeddings()(more[b, :step])])
                torch.testing.assert_close(logits[b], by_hand(model, x, cut=cut, edit=edit)[-1], rtol=0, atol=1e-6)
                changed += done
            logits = model.step(stream, more[:, step])
    assert changed


def test_rows_up_to_the_image_and_rows_without_one_stay(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt", "tttt", "t#t#tt")
    bare = model(inputs)
    with attach(model, Var(tau=2.2, rho=0.0, image_min=0.0).program(model.facts)):
        out = model(inputs)
    after = out.layout.last(out.layout.visual)
    places = torch.arange(out.hidden.shape[1])
    for b in range(3):
        same = places <= after[b] if b != 1 else out.layout.valid[b]
        assert torch.equal(out.hidden[b, same], bare.hidden[b, same])
    assert not torch.equal(out.hidden[0, after[0] + 1 :], bare.hidden[0, after[0] + 1 :])


def test_sinks_are_found_in_each_layer(make_model, batch, spliced, by_hand):
    # with the sinks of layer 2 in layer 3 as well, the answer would differ: the states that enter the two differ
    model, inputs, method = make_model(), batch("tt#ttt"), Var(tau=2.4, rho=0.0, skip_last=False)
    x, image_of, _ = spliced(model, inputs)
    edit, done = dense_var(image_of, method)
    frozen = []

    def with_sinks_of_layer_2(layer, x, place, attention):
        frozen.append(x)
        return edit(layer, frozen[2] if layer == 3 else x, place, attention)

    with torch.no_grad(), attach(model, method.program(model.facts)):
        logits, _ = model.prefill(inputs)
        torch.testing.assert_close(logits[0], by_hand(model, x, edit=edit)[-1], rtol=0, atol=1e-6)
        wrong = by_hand(model, x, edit=with_sinks_of_layer_2)[-1]
    assert {layer for layer, _ in done} == {2, 3}
    assert (logits[0] - wrong).abs().max() > 1e-3


def test_no_sinks_changes_nothing(make_model, batch):
    # an entry of a normalised state of width 32 is at most sqrt(32) = 5.66
    model, inputs = make_model(), batch("tt#ttt")
    bare = model(inputs)
    with attach(model, Var(tau=5.7).program(model.facts)):
        torch.testing.assert_close(model(inputs).hidden, bare.hidden, rtol=0, atol=1e-9)


def test_a_sink_dimension_that_the_model_lacks_is_refused():
    with pytest.raises(ModelError, match=r"var.dims: the language model has dimensions 0..31; found 2533"):
        Var(dims=(3, 2533)).program(Facts(layers=4, width=32))


def test_the_settings_that_move_nothing_are_empty():
    facts = Facts(layers=4, width=32)
    assert Var(taken=0.0).program(facts) == () == Var(taken=1.0, semantics="code").program(facts)
    assert [site.layer for site, _ in Var().program(facts)] == [2]
    assert [site.layer for site, _ in Var(skip_last=False).program(facts)] == [2, 3]
