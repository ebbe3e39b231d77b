"""FastV and cuts before the language model against a decoder written out in dense matrices."""

from math import exp

import pytest
import torch

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.program.program import Select
from vlm.models.pruners.divprune import Divprune
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.stride import Stride

KINDS = ["llama", "qwen2", "qwen3", "mistral"]


def fastv_cut(image_of, layer, keep, answer=0, weight=lambda x: 1.0):
    """FastV as in the paper: mean over heads of the last row's attention in the layer before, text always kept.

    Tokens that were generated later are text as well; the score is that of the last prompt token. In training the
    last ``answer`` tokens are the answer, which does not ask. ``weight`` of a token's place in its image, 0 to 1.
    """
    prompt = len(image_of)
    weights = torch.ones(prompt, dtype=torch.float64)
    for image in range(int(image_of.max()) + 1):
        places = torch.nonzero(image_of == image).flatten()
        weights[places] = torch.tensor([weight(n / (len(places) - 1)) for n in range(len(places))]).double()

    def cut(number, place, attention):
        if number != layer:
            return None
        score = (attention[:, prompt - answer - 1].mean(0)[:prompt] * weights).masked_fill(image_of < 0, -1)
        kept = score.argsort(descending=True, stable=True)[:keep]
        text = torch.nonzero(image_of < 0).flatten()
        return torch.cat([kept, text, torch.arange(prompt, len(place))]).sort().values

    return cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv_equals_the_dense_procedure(make_model, batch, spliced, by_hand, kind, layer):
    model, inputs = make_model(kind), batch("tt#ttt", "t#t#t")
    with torch.no_grad(), attach(model, Fastv(Budget.parse("25%"), layer).program(model.facts)):
        out = model(inputs)
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            keep = int((image_of >= 0).sum()) // 4
            expected = by_hand(model, x, cut=fastv_cut(image_of, layer, keep))
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("debias", "weight"),
    [
        (2.3, lambda x: exp(-2.3 * x)),
        ("fastv", lambda x: 1 / (4.88412565 * x**3 - 4.82643345 * x**2 + 1.73373862 * x + 1)),
    ],
)
def test_debiased_attention_is_reweighted_by_the_place_in_the_image(
    make_model, batch, spliced, by_hand, debias, weight
):
    model, inputs = make_model(), batch("tt#ttt", "t#t#t")
    method = Fastv(Budget.parse("25%"), debias=Debias.parse(debias))
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out, plain = model(inputs), []
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            keep = int((image_of >= 0).sum()) // 4
            expected = by_hand(model, x, cut=fastv_cut(image_of, 2, keep, weight=weight))
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            plain.append(torch.equal(expected, by_hand(model, x, cut=fastv_cut(image_of, 2, keep))))
    assert not all(plain)  # the weight did change a choice


@pytest.mark.parametrize(
    ("layer", "average", "kept"), [(2, 192, 166), (2, 128, 98), (2, 64, 30), (3, 192, 152), (3, 128, 82), (3, 64, 11)]
)
def test_an_average_over_layers_keeps_what_the_literature_says(make_model, layer, average, kept):
    # FastV "at 192" of 576 tokens and 32 layers, when 192 means the average over layers
    facts = make_model().facts
    shape = facts.shape.__class__(**{**vars(facts.shape), "layers": 32})
    facts = facts._replace(layers=32, visual=576, shape=shape)
    ((site, op),) = Fastv(Budget.parse({"average": average}), layer).program(facts)
    assert isinstance(op, Select)
    assert (site.layer, op.keep.tokens) == (layer, kept)


def test_fastv_decoding_equals_recomputing_the_whole_sequence(make_model, batch, spliced, by_hand):
    model, inputs = make_model(), batch("tt#ttt", "t#", "#t##tt")
    more = torch.randint(0, 40, (3, 4))
    with torch.no_grad(), attach(model, Fastv(Budget.parse("25%")).program(model.facts)):
        logits, stream = model.prefill(inputs)
        for step in range(5):
            for b in range(3):
                x, image_of, _ = spliced(model, inputs, b)
                x = torch.cat([x, model.language.get_input_embeddings()(more[b, :step])])
                expected = by_hand(model, x, cut=fastv_cut(image_of, 2, int((image_of >= 0).sum()) // 4))
                torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)
            if step < 4:
                logits = model.step(stream, more[:, step])


def test_the_cache_is_shorter_from_the_cut_on(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt")
    with torch.no_grad(), attach(model, Fastv(Budget.parse("25%")).program(model.facts)):
        _, stream = model.prefill(inputs)
        assert [stream.cache.get_seq_length(layer) for layer in range(4)] == [41, 41, 14, 14]
        assert stream.run.visual_tokens(4) == [36, 36, 9, 9]
        for step in range(3):
            model.step(stream, torch.tensor([1]))
            lengths = [stream.cache.get_seq_length(layer) for layer in range(4)]
            assert lengths == [42 + step, 42 + step, 15 + step, 15 + step]


def test_the_score_is_of_the_last_valid_row_under_right_padding(make_model, batch, alone):
    # official code reads row -1, which is padding in a right-padded batch
    model, inputs = make_model(), batch("tt#t", "tttttttttt#t")
    with attach(model, Fastv(Budget.parse(6)).program(model.facts)):
        together, single = model(inputs).layout, model(alone(inputs, 0)).layout
    kept = together.valid[0]
    assert torch.equal(together.row[0, kept], single.row[0]) and torch.equal(together.col[0, kept], single.col[0])


def test_fastv_gradients_equal_those_of_the_dense_procedure(make_model, batch, spliced, by_hand):
    model, inputs = make_model().train(), batch("tt#ttt")
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.5]])
    with attach(model, Fastv(Budget.parse("25%")).program(model.facts)):
        model(inputs, weights).loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    x, image_of, token_of = spliced(model, inputs)
    log_p = by_hand(model, x, cut=fastv_cut(image_of, 2, 9, answer=2)).log_softmax(-1)
    (-log_p[-3, token_of[-2]] - 0.5 * log_p[-2, token_of[-1]]).backward()
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()  # the loss is summed in single precision
        torch.testing.assert_close(mine[name], p.grad, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("method", [Stride, Divprune])
@pytest.mark.parametrize("position", ["keep", "reindex"])
def test_a_cut_before_the_language_model_equals_the_shorter_sequence(
    make_model, batch, spliced, by_hand, method, position
):
    # one row and no padding: position ids with jumps must not be read as packed samples
    model, inputs = make_model(), batch("tt#ttt")
    with torch.no_grad(), attach(model, method(Budget.parse("25%"), position=position).program(model.facts)):
        out = model(inputs)
        logits, stream = model.prefill(inputs)
        after = model.step(stream, torch.tensor([7]))
        x, image_of, _ = spliced(model, inputs)
        seen = out.layout.visual[0]
        image_places = torch.nonzero(image_of >= 0).flatten()
        raster = out.layout.row[0, seen] * 6 + out.layout.col[0, seen]
        kept = torch.cat([torch.nonzero(image_of < 0).flatten(), image_places[raster]]).sort().values
        ids = kept if position == "keep" else torch.arange(len(kept))
        expected = by_hand(model, x[kept], ids)
        torch.testing.assert_close(model.logits(out.hidden[0]), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(logits[0], expected[-1], rtol=0, atol=1e-9)
        longer = torch.cat([x[kept], model.language.get_input_embeddings()(torch.tensor([7]))])
        expected = by_hand(model, longer, torch.cat([ids, ids[-1:] + 1]))
        torch.testing.assert_close(after[0], expected[-1], rtol=0, atol=1e-9)


def test_stride_keeps_even_places_of_the_grid(make_model, batch):
    model = make_model()
    with attach(model, Stride(Budget.parse(9)).program(model.facts)):
        layout = model(batch("t#t")).layout
    seen = layout.visual[0]
    assert (layout.row[0, seen] * 6 + layout.col[0, seen]).tolist() == list(range(2, 36, 4))
