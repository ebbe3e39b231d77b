"""PruMerge in a model against its formulas written out, and on the numbers of the official code."""

import numpy
import pytest
import torch
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import VIT_OUT
from vlm.models.program.signals import Attention, OneHeadClassRow, PatchKeys
from vlm.models.pruners.prumerge import Prumerge


def one_head(block) -> tuple[Tensor, Tensor]:
    """Attention of the class token to the patches with all heads as one, and the keys: [images, patches(, width)]."""
    q, k = (t.transpose(1, 2).flatten(2) for t in (block.q, block.k))
    row = (q[:, :1] @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1)
    return row[:, 0, 1:], k[:, 1:]


def merged(x: Tensor, key: Tensor, weight: Tensor, kept: list[int], neighbours: int) -> tuple[list[int], list[Tensor]]:
    """Places and features of one image: kept patches with their neighbours, and the rest at its heaviest patch."""
    alike = torch.nn.functional.cosine_similarity(key[:, None], key[None], dim=-1)
    out = {}
    for i in kept:
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(alike[i, j]))[:neighbours]
        out[i] = x[i] + sum(weight[j] * x[j] for j in near)
    rest = [j for j in range(len(x)) if j not in kept]
    out[max(rest, key=lambda j: float(weight[j]))] = torch.stack([weight[j] * x[j] for j in rest]).sum(0)
    return sorted(out), [out[i] for i in sorted(out)]


def check(model, inputs, by_eye, method, kept_of, row_and_key):
    program = method.program(model.facts)
    layouts = []
    with attach(model, program):
        features = by_eye.handed_over(model, lambda: layouts.append(model(inputs).layout))
    seen = by_eye.look(model, inputs.images)
    row, key = row_and_key(seen)
    sizes = []
    for n in range(len(inputs.images)):
        places, expected = merged(seen.features[n], key[n], row[n], kept_of(row[n]), method.neighbours)
        assert by_eye.places(layouts[0], n) == places
        torch.testing.assert_close(features[n, : len(places)], torch.stack(expected), rtol=0, atol=1e-9)
        sizes.append(len(places))
    return sizes


@pytest.mark.parametrize(("keep", "options", "block"), [(9, {}, 3), (5, {"layer": 1, "neighbours": 4}, 1), (1, {}, 3)])
def test_a_budget_is_met_exactly_with_the_rest_token(clear, batch, by_eye, keep, options, block):
    def kept_of(row):
        return by_eye.best(row, keep - 1)

    method = Prumerge(Budget(tokens=keep), **options)
    sizes = check(clear(), batch("t#t#", "#t"), by_eye, method, kept_of, lambda seen: one_head(seen.blocks[block]))
    assert sizes == [keep] * 3


def test_without_a_budget_each_image_keeps_its_outliers(clear, batch, by_eye):
    def kept_of(row):
        values = row.detach().numpy()
        low, high = numpy.percentile(values, [25, 75])
        return [i for i, value in enumerate(values) if value > high + 1.5 * (high - low)] or by_eye.best(row, 1)

    model, inputs = clear(), batch("t#t#", "#t")
    sizes = check(model, inputs, by_eye, Prumerge(neighbours=6), kept_of, lambda seen: one_head(seen.blocks[3]))
    assert len(set(sizes)) > 1 and max(sizes) < 12


def test_received_attention_for_encoders_without_a_class_token(clear, batch, by_eye):
    method = Prumerge(Budget(tokens=6), attention="received", neighbours=3)
    check(
        clear(class_token=False),
        batch("t#t#", "#t"),
        by_eye,
        method,
        lambda row: by_eye.best(row, 5),
        lambda seen: (seen.received(), seen.blocks[3].k.transpose(1, 2).flatten(2)),
    )


def test_gives_the_tokens_of_the_official_code(clear, by_eye, signed, golden):
    hidden, query, key = signed(81, 1, 577, 8), 6 * signed(82, 1, 577, 8), signed(83, 1, 577, 8)
    valid = torch.ones(1, 577, dtype=torch.bool)
    seen = Attention(
        query[:, None], key[:, None], key[:, None], valid, {"causal": False, "scale": None}, "auto", prefix=1
    )
    program = Prumerge().program(clear().facts)
    tokens = by_eye.given(hidden[:, 1:], lambda signal: signal.read(seen))
    kept, found = by_eye.apply(program, tokens)
    assert int(kept.sum()) / 576 == golden["prumerge"]["ratio"]
    assert int(found.valid.sum()) == golden["prumerge"]["n"]
    strongest = OneHeadClassRow(3).read(seen)[0].argmax()
    first = found.features[0, found.place[0] == strongest][0]
    torch.testing.assert_close(first, torch.tensor(golden["prumerge"]["first"]), rtol=1e-5, atol=1e-6)
    rest = found.features[0, ~kept[0, found.place[0]]]
    torch.testing.assert_close(rest, torch.tensor([golden["prumerge"]["last"]]), rtol=1e-4, atol=1e-6)


def test_reads_the_last_block_by_default_wherever_features_come_from(clear):
    facts = clear().facts
    vision = facts.vision._replace(output=2)
    [(site, op)] = Prumerge(Budget(tokens=9)).program(facts._replace(vision=vision))
    assert site == VIT_OUT and set(op.selector.needs) == {OneHeadClassRow(3), PatchKeys(3)}
    with pytest.raises(ModelError) as error:  # an encoder that ends with the block of its features
        Prumerge(Budget(tokens=9)).program(facts._replace(vision=vision._replace(blocks=3)))
    assert str(error.value) == "prumerge: expected a block of the vision encoder, 0..2; found 3"


def test_bad_input(needs_class_token):
    needs_class_token(Prumerge, "prumerge")
