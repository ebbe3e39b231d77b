"""PyramidDrop against its procedure in dense matrices: a stage ranks by the attention of the layer that comes next."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.debias import Debias
from vlm.models.pruners.pyramiddrop import Pyramiddrop

LAYERS = (1, 2, 3)


def choose(
    by_hand: Any,
    model: Any,
    x: Tensor,
    image_of: Tensor,
    counts: list[int],
    asks: list[int],
    reindex: bool,
    sigma: float,
) -> dict[int, Tensor]:
    """Rows that enter each stage's layer: found one after the other, each from a pass that has the cuts before it."""
    cuts: dict[int, Tensor] = {}
    first = {i: n for n, i in enumerate(torch.nonzero(image_of >= 0).flatten().tolist())}
    for layer, count in zip(LAYERS, counts, strict=True):
        seen: list[tuple[Tensor, Tensor]] = []

        def edit(
            number: int, x: Tensor, place: Tensor, attention: Tensor, layer: int = layer, seen: Any = seen
        ) -> Tensor:
            if number == layer:
                seen.append((place, attention))
            return attention

        by_hand(model, x, cut=lambda number, *_: cuts.get(number), edit=edit, reindex=reindex)
        ((place, attention),) = seen
        rows = [place.tolist().index(ask) for ask in asks]
        visual = [i for i, p in enumerate(place.tolist()) if p in first]
        score = attention[:, rows].mean((0, 1))[visual]
        score = score * torch.tensor([math.exp(-sigma * first[int(place[i])] / (len(first) - 1)) for i in visual])
        kept = {visual[i] for i in score.argsort(descending=True, stable=True)[:count].tolist()}
        cuts[layer] = torch.tensor([i for i in range(len(place)) if i in kept or i not in visual])
    return cuts


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("position", "sigma"), [("keep", 0.0), ("reindex", 0.0), ("keep", 2.3)])
def test_pyramiddrop_equals_the_dense_procedure(make_model, batch, spliced, by_hand, kind, position, sigma):
    model, inputs = make_model(kind), batch("tt#tttt", "#tt")
    debias = Debias(sigma) if sigma else None
    method = Pyramiddrop(Budget.parse(3), shares=(4, 2, 1), debias=debias, position=position)
    more = torch.randint(0, 40, (2, 3), generator=torch.Generator().manual_seed(1))
    reindex = position == "reindex"
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out, (logits, stream) = model(inputs), model.prefill(inputs)
        cuts = []
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            cuts.append(choose(by_hand, model, x, image_of, [12, 6, 3], [len(x) - 1], reindex, sigma))
            expected = by_hand(model, x, cut=lambda number, *_, b=b: cuts[b].get(number), reindex=reindex)
            got = model.logits(out.hidden[b][out.layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)
        for step in range(3):
            logits = model.step(stream, more[:, step])
            for b in range(2):
                x, _, _ = spliced(model, inputs, b)
                whole = torch.cat([x, model.language.get_input_embeddings()(more[b, : step + 1])])

                def cut(number: int, place: Tensor, attention: Tensor, b: int = b, new: int = step + 1) -> Any:
                    kept = cuts[b].get(number)  # of the prompt; generated tokens stay
                    prompt = len(place) - new
                    return kept if kept is None else torch.cat([kept, torch.arange(prompt, len(place))])

                expected = by_hand(model, whole, cut=cut, reindex=reindex)
                torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)


def supervised(row: str) -> Tensor:
    """Loss weights [1, length] of a row: ``a`` is an answer's token."""
    return torch.tensor([[1.0 if mark == "a" else 0.0 for mark in row]], dtype=torch.float64)


def test_in_training_the_tokens_before_each_answer_ask(make_model, batch, spliced, by_hand, gradients):
    model, row = make_model().train(), "t#ttaattatta"
    inputs, weights = batch(row.replace("a", "t")), supervised(row)
    method = Pyramiddrop(Budget.parse(3), shares=(4, 2, 1))
    x, image_of, token_of = spliced(model, inputs)
    asks = [35 + i for i in range(1, len(row) - 1) if row[i] == "t" and row[i + 1] == "a"]
    assert len(asks) == 3
    cuts = choose(by_hand, model, x, image_of, [12, 6, 3], asks, False, 0.0)
    alone = choose(by_hand, model, x, image_of, [12, 6, 3], [len(x) - 1], False, 0.0)
    assert not torch.equal(cuts[1], alone[1])
    with attach(model, method.program(model.facts)):
        model(inputs, weights).loss.backward()
    mine = gradients(model)
    log_p = by_hand(model, x, cut=lambda number, *_: cuts.get(number)).log_softmax(-1)
    text = [i for i, mark in enumerate(row) if mark == "a"]
    losses = [-log_p[i - len(row) - 1, token_of[i - len(row)]] for i in text]
    torch.stack(losses).sum().backward()
    for name, expected in gradients(model).items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("style", ["forward", "hooks too"])
def test_looking_ahead_under_gradient_checkpointing_gives_the_same_gradients(
    make_model, batch, style, checkpointing, gradients
):
    model, inputs, other = make_model().train(), batch("tt#ttt", "#t##tt"), batch("t#tttt", "#ttttt")
    weights = (inputs.tokens >= 0).double() * inputs.valid
    with attach(model, Pyramiddrop(Budget.parse("25%")).program(model.facts)):
        first, second = model(inputs, weights), model(other, weights)
        (first.loss + second.loss).backward()
        plain = gradients(model)
        checkpointing(model, style)
        again = [model(inputs, weights), model(other, weights)]
        assert torch.equal(again[0].layout.image, first.layout.image)
        (again[0].loss + again[1].loss).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_published_budgets_come_out(make_model):
    # 2.6 and 2.31 of the pages: 128 with stages 2, 10, 20 and shares .32 .16 .08; .5 .25 .125 average 270
    facts = make_model().facts
    assert facts.shape is not None
    shape = facts.shape.__class__(**{**vars(facts.shape), "layers": 32})
    facts = facts._replace(layers=32, visual=576, shape=shape)
    method = Pyramiddrop(Budget.parse({"average": 128}), (2, 10, 20), (0.32, 0.16, 0.08))
    assert [op.keep.tokens for _, op in method.program(facts)] == [184, 92, 46]  # type: ignore[union-attr]
    method = Pyramiddrop(Budget.parse({"average": 270}))
    program = method.program(facts)
    assert [site.layer for site, _ in program] == [8, 16, 24]
    assert [op.keep.tokens for _, op in program] == [288, 144, 72]  # type: ignore[union-attr]
