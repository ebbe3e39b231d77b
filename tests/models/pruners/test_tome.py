"""ToMe in a model against blocks and pairs written out, its counts, and the numbers of the official code."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.merge import counts_to, merges_per_block
from vlm.models.program.program import Select, vit_mid
from vlm.models.program.signals import PatchKeys
from vlm.models.pruners.tome import Tome


def merge(x: Tensor, key: Tensor, size: list[float], place: list[int], merges: int, prefix: int) -> Any:
    """One image's tokens [prefix + patches, width] after ``merges`` pairs: patches numbered with what stands before."""
    alike = torch.nn.functional.cosine_similarity(key[:, None], key[None], dim=-1)
    first = [i for i in range(0, len(x), 2) if i >= prefix]
    second = [i for i in range(1, len(x), 2) if i >= prefix]
    partner = {a: max(second, key=lambda b, a=a: float(alike[a, b])) for a in first}
    gone = sorted(first, key=lambda a: -float(alike[a, partner[a]]))[:merges]
    groups = {i: [i] for i in range(len(x)) if i not in gone}
    for a in gone:
        groups[partner[a]].append(a)
    weight = torch.tensor(size, dtype=x.dtype)
    features = [(weight[own, None] * x[own]).sum(0) / weight[own].sum() for own in groups.values()]
    sizes = [sum(size[i] for i in own) for own in groups.values()]
    return torch.stack(features), sizes, [place[i - prefix] for i in groups if i >= prefix]


@torch.no_grad()
def by_hand(model: Any, by_eye: Any, image: Tensor, counts: list[int], prefix: int, proportional: bool) -> Any:
    """Places and features of one image through the encoder's own layers, blocks written out."""
    entered: list[Tensor] = []
    handle = model.vision.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model.vision(image[None])
    handle.remove()
    x, size, place = entered[0][0], [1.0] * (36 + prefix), list(range(36))
    for block, left in zip(model.vision.blocks, counts, strict=True):
        seen = by_eye.attend(block, x[None])
        weigh = torch.tensor(size, dtype=x.dtype).log() if proportional else 0
        scores = seen.q @ seen.k.transpose(2, 3) * seen.q.shape[3] ** -0.5 + weigh
        x = x + block.attn.proj((scores.softmax(-1) @ seen.v).transpose(1, 2).flatten(2))[0]
        x, size, place = merge(x, seen.k[0].mean(0), size, place, len(place) - left, prefix)
        x = x + block.mlp(block.norm2(x))
    return place, model.vision.model.norm(x)[prefix:]


@pytest.mark.parametrize(
    ("keep", "options", "counts"),
    [
        (12, {}, [30, 24, 18, 12]),
        (9, {"inflection": -1.0}, [22, 13, 9, 9]),
        (12, {"proportional": False}, [30, 24, 18, 12]),
        (5, {}, [28, 20, 10, 5]),
    ],
)
@pytest.mark.parametrize("class_token", [True, False])
def test_equals_blocks_and_pairs_written_out(clear, batch, by_eye, keep, options, counts, class_token):
    model, inputs, layouts = clear(class_token=class_token), batch("t#t#", "#t"), []
    with torch.no_grad(), attach(model, Tome(Budget(tokens=keep), **options).program(model.facts)):
        features = by_eye.handed_over(model, lambda: layouts.append(model(inputs).layout))
    proportional = options.get("proportional", True)
    for n in range(3):
        places, expected = by_hand(model, by_eye, inputs.images[n], counts, int(class_token), proportional)
        assert by_eye.places(layouts[0], n) == places and len(places) == keep
        torch.testing.assert_close(features[n], expected, rtol=0, atol=1e-9)


def test_gives_the_tokens_of_the_official_code(clear, by_eye, signed, golden):
    x, facts = signed(21, 1, 9, 4), clear(blocks=1).facts  # the first token is the class token
    program = Tome(Budget(tokens=5)).program(facts._replace(visual=8))
    tokens = by_eye.given(x[:, 1:], {PatchKeys(0): x[:, None, 1:]}.__getitem__)
    kept, found = by_eye.apply(program, tokens)
    place = (found.place[0] + 1).tolist()
    order = sorted(range(len(place)), key=lambda i: (place[i] % 2, place[i]))  # there the first half comes first
    assert found.size[0, order].tolist() == golden["tome_cls"]["size"][1:]
    torch.testing.assert_close(found.features[0, order], torch.tensor(golden["tome_cls"]["y"][1:]), rtol=0, atol=1e-6)
    assert kept[0].nonzero().flatten().tolist() == found.place[0].tolist()


@given(st.integers(1, 700), st.integers(1, 30), st.floats(-1, 1), st.data())
def test_any_budget_is_met_at_the_end(total, blocks, inflection, data):
    least = -(-total // 2**blocks)
    keep = data.draw(st.integers(least, total))
    counts = counts_to(keep, total, blocks, inflection)
    assert counts[-1] == keep and len(counts) == blocks
    for before, after in zip([total, *counts], counts, strict=False):
        assert 0 <= before - after <= before // 2
    if least > 1:
        with pytest.raises(ModelError, match=f"expected at least {least} of {total} tokens after {blocks} blocks"):
            counts_to(least - 1, total, blocks, inflection)


def test_counts_are_those_of_the_official_schedule_where_it_divides():
    for total, keep, blocks in ((576, 192, 24), (100, 40, 12)):
        merges = merges_per_block(blocks, (total - keep) / blocks)
        assert counts_to(keep, total, blocks) == [total - sum(merges[: b + 1]) for b in range(blocks)]
    assert counts_to(192, 576, 23)[-1] == 192


def test_the_program_acts_in_every_block_up_to_that_of_the_features(clear):
    facts = clear().facts
    program = Tome(Budget(tokens=9)).program(facts._replace(vision=facts.vision._replace(output=2)))
    assert [site for site, _ in program] == [vit_mid(0), vit_mid(1), vit_mid(2)]
    ops = [op for _, op in program if isinstance(op, Select)]
    assert all(op.weigh for op in ops) and [op.exact for op in ops] == [False, False, True]


def test_bad_input(clear):
    facts = clear().facts
    hidden = facts._replace(vision=None)
    cases = [
        (Tome(Budget(tokens=2)), facts, "merging: expected at least 3 of 36 tokens after 4 blocks; found 2"),
        (Tome(Budget(tokens=9), inflection=2.0), facts, "tome: expected inflection in -1..1; found 2.0"),
        (Tome(Budget(tokens=9)), hidden, "tome: it needs a vision encoder that programs can see"),
    ]
    for method, of, message in cases:
        with pytest.raises(ModelError) as error:
            method.program(of)
        assert str(error.value) == message
