"""FastOCR's steps against dense attention in which each layer's row sees its own subset."""

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.kv.fastocr import Fastocr
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.fastv import Fastv


def restated(model, by_hand, x, image, prompt, focal, count, cut=None):
    """Logits of the generated rows, one pass over all rows for each of them: what a row reads before the first focal
    layer hangs on what the last focal layer paid in the row before."""
    sets: dict[tuple[int, int], set[int]] = {}  # (row, focal layer) -> places chosen

    def edit(number, _, place, attention):
        attention = attention.clone()
        for row in (place >= prompt).nonzero().flatten().tolist():
            at = int(place[row])
            visual = [i for i, p in enumerate(place.tolist()) if p < prompt and image[p] >= 0]
            if number in focal:
                paid = attention[:, row].mean(0)
                chosen = sorted(visual, key=lambda i, s=paid: (-float(s[i]), i))[: min(count, len(visual))]
                sets[at, number] = set(place[chosen].tolist())
                continue
            before = [f for f in focal if f < number]
            source = (at, before[-1]) if before else (at - 1, focal[-1])
            if source not in sets:
                continue  # the first step reads all
            attention[:, row, [i for i in visual if int(place[i]) not in sets[source]]] = 0
            attention[:, row] /= attention[:, row].sum(1, keepdim=True)
        return attention

    out = x
    for _ in range(len(x) - prompt):  # each pass settles one more row
        out = by_hand(model, x, edit=edit) if cut is None else by_hand(model, x, edit=edit, cut=cut)
    return out[-(len(x) - prompt) :]


@pytest.mark.parametrize(("focal", "keep"), [((), "10%"), ((2,), "10%"), ((0, 2), 3), ((1, 3), "5%"), ((3,), 2)])
def test_steps_read_what_the_focal_layers_chose(make_model, batch, spliced, by_hand, focal, keep):
    model, inputs, steps = make_model(), batch("tt#ttt", "t#t#tt", "tttt"), 4
    tokens = torch.randint(0, 40, (3, steps))
    with torch.no_grad(), attach(model, Fastocr(Budget.parse(keep), focal).program(model.facts)):
        _, stream = model.prefill(inputs)
        got = [model.step(stream, tokens[:, step]) for step in range(steps)]
    assert stream.run.held == {}
    for b, visual in enumerate((36, 72, 0)):
        x, image, _ = spliced(model, inputs, b)
        count = Budget.parse(keep).of(visual) if visual else 0
        whole = torch.cat([x, model.language.get_input_embeddings()(tokens[b])])
        with torch.no_grad():
            expected = restated(model, by_hand, whole, image, len(x), focal or (1, 2), count)
            plain = by_hand(model, whole)[-steps:]
        for step in range(steps):
            torch.testing.assert_close(got[step][b], expected[step], rtol=0, atol=1e-9)
        assert ((expected - plain).abs().max() > 1e-3) == (visual > 0)


@pytest.mark.parametrize("focal", [(0,), (0, 3), (1, 2), (3,)])
def test_sets_are_carried_over_a_cut(make_model, batch, spliced, by_hand, focal):
    model, inputs, steps = make_model(), batch("t#t#tt", "tt#ttt"), 3
    tokens = torch.randint(0, 40, (2, steps))
    cut = Fastv(Budget.parse("50%")).program(model.facts)
    with torch.no_grad(), attach(model, cut + Fastocr(Budget.parse(9), focal).program(model.facts)):
        _, stream = model.prefill(inputs)
        got = [model.step(stream, tokens[:, step]) for step in range(steps)]
    for b in range(2):
        x, image, _ = spliced(model, inputs, b)
        layout = stream.run.layouts[2]
        left = layout.position[b, layout.valid[b]]
        gather = lambda layer, place, _, left=left: torch.isin(place, left).nonzero().flatten() if layer == 2 else None  # noqa: E731
        whole = torch.cat([x, model.language.get_input_embeddings()(tokens[b])])
        with torch.no_grad():
            expected = restated(model, by_hand, whole, image, len(x), focal, 9, gather)
        for step in range(steps):
            torch.testing.assert_close(got[step][b], expected[step], rtol=0, atol=1e-9)


def test_a_focal_layer_that_is_not_there(make_model):
    with pytest.raises(ModelError, match=r"kv.focal: expected layers 0..3; found 4"):
        Fastocr(Budget.parse("5%"), (1, 4)).program(make_model().facts)
