"""CDPruner against a greedy choice that computes every determinant."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.cdpruner import Cdpruner


def greedy(x: Tensor, relevance: Tensor, count: int) -> list[int]:
    """Token by token the one whose addition makes the largest determinant."""
    unit = normalize(x, dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    kept: list[int] = []
    for _ in range(count):
        others = [i for i in range(len(x)) if i not in kept]
        kept.append(max(others, key=lambda i: float(torch.linalg.det(kernel[[*kept, i]][:, [*kept, i]]))))
    return sorted(kept)


def relevance_of(visual: Tensor, words: Tensor) -> Tensor:
    mean = (normalize(visual, dim=1) @ normalize(words, dim=1).T).mean(1)
    return (mean - mean.min() + 1e-6) / (mean.max() - mean.min())


@pytest.mark.parametrize("relevance", ["language", "none"])
def test_cdpruner_equals_the_greedy_determinant(make_model, batch, spliced, by_hand, relevance):
    model, inputs = make_model(), batch("tt#tttt", "#tt")
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9), relevance).program(model.facts)):
        out, (logits, _) = model(inputs), model.prefill(inputs)
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            visual = torch.nonzero(image_of >= 0).flatten()
            weight = relevance_of(x[visual], x[visual[-1] + 1 :]) if relevance == "language" else torch.ones(36)
            chosen = greedy(x[visual], weight.double(), 9)
            layout = out.layout
            assert (layout.row * 6 + layout.col)[b][layout.visual[b]].tolist() == chosen
            kept = torch.cat([torch.nonzero(image_of < 0).flatten(), visual[chosen]]).sort().values
            expected = by_hand(model, x[kept])  # positions anew, by default
            got = model.logits(out.hidden[b][layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)


def test_the_question_matters_and_the_answer_does_not(make_model, batch):
    model, inputs = make_model(), batch("tt#tttttt")
    other = inputs._replace(tokens=inputs.tokens.clone())
    other.tokens[0, 6:] = (inputs.tokens[0, 6:] + 7) % 40
    weights = torch.tensor([[0.0] * 6 + [1.0] * 3])
    places = []
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9)).program(model.facts)):
        for layout in (model(inputs, weights).layout, model(other, weights).layout, model(other).layout):
            places.append((layout.row * 6 + layout.col)[layout.visual].tolist())
    assert places[0] == places[1]
    assert places[0] != places[2]


def test_without_relevance_the_question_does_not_matter(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt")
    other = inputs._replace(tokens=(inputs.tokens + 7) % 40)
    other.tokens[0, 2] = -1
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9), "none").program(model.facts)):
        assert torch.equal(model(inputs).layout.col, model(other).layout.col)
