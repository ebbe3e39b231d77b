"""HiRED in a model: single images, images in tiles, and the numbers of the official code."""

from typing import Any

import pytest
import torch

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.signals import PatchAttention
from vlm.models.pruners.hired import Hired
from vlm.models.tiles import tile_table
from vlm.models.vision_language import VisionLanguageModel


def test_a_single_image_keeps_what_the_class_token_looks_at(clear, batch, by_eye):
    for model, options in ((clear(), {}), (clear(class_token=False), {"attention": "received"})):
        inputs = batch("t#t#", "#t")
        with attach(model, Hired(Budget(tokens=8), **options).program(model.facts)):
            layout = model(inputs).layout
        seen = by_eye.look(model, inputs.images)
        score = seen.received() if options else seen.class_row(how="sum")
        assert [by_eye.places(layout, n) for n in range(3)] == [sorted(by_eye.best(score[n], 8)) for n in range(3)]


def quotas(attention: Any, by_eye: Any, total: int, crops: int, share: float, room: list[int]) -> list[int]:
    """What the whole picture and each crop keep, as the official code counts it, and then the rest of the budget."""
    n = len(attention)
    whole = min(int(total * share), n)
    voters = by_eye.best(attention, int(n * (1 - share)))
    votes = [sum(v // (n // crops) == crop for v in voters) for crop in range(crops)]
    quota = [whole, *(min(int(v / len(voters) * (total - whole)), n) for v in votes)]
    quota = [min(pair) for pair in zip(quota, room, strict=True)]
    return [quota[0] + min(total - sum(quota), room[0] - quota[0]), *quota[1:]]


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("keep", ["30%", 20])
def test_an_image_in_tiles_shares_its_budget_by_early_attention(clear, batch, by_eye, share, keep):
    parts, inputs = clear(), batch("t#", "##")
    model = VisionLanguageModel(parts.vision, parts.connector, parts.language, max_tiles=4).double().eval()
    shapes = [(2, 2), (0, 0), (1, 2)]
    views = torch.randn(9, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tiles = torch.tensor([[2, 2, 96, 96], [0, 0, 48, 48], [1, 2, 24, 96]])  # the last one is half padding
    inputs = inputs._replace(images=views, tiles=tiles)
    budget = Budget.parse(keep)
    with attach(model, Hired(budget, whole=share).program(model.facts)):
        layout = model(inputs).layout
    seen = by_eye.look(model, views)
    early, late = seen.class_row(0), seen.class_row(3)
    table, first = tile_table(tiles, (6, 6), True, 9), 0
    assert not bool(table.real[7:].all())
    for image, (rows, columns) in enumerate(shapes):
        own = range(first, first + 1 + rows * columns)
        room = [int(table.real[view].sum()) for view in own]
        total = budget.of(sum(room))
        quota = quotas(early[first], by_eye, total, len(own) - 1, share, room) if len(own) > 1 else [total]
        expected = []
        for view, count in zip(own, quota, strict=True):
            real = table.real[view].nonzero().flatten().tolist()
            expected += [
                (int(table.row[view, p]), int(table.col[view, p])) for p in by_eye.best(late[view], count, real)
            ]
        mine = layout.image == image
        assert list(zip(layout.row[mine].tolist(), layout.col[mine].tolist(), strict=True)) == sorted(expected)
        assert len(expected) == total
        first += len(own)


def test_gives_the_choice_of_the_official_code(clear, by_eye, signed, golden):
    early, late = ((2 * signed(seed, 5, 2, 65, 65)).softmax(-1)[:, :, 0, 1:] for seed in (131, 132))
    tokens = by_eye.given(
        torch.zeros(5, 64, 4),
        {PatchAttention(0, "class"): early, PatchAttention(3, "class"): late}.__getitem__,
        image=torch.zeros(5, dtype=torch.long),
    )
    [(_, op)] = Hired(Budget(tokens=64)).program(clear().facts)
    count = torch.tensor([13, 13, 13, 13, 12])  # 20 % of 5 x 64, however they come
    kept = [row.nonzero().flatten().tolist() for row in op.selector.choose(tokens, count)]
    assert kept == golden["hired"]
    more = [
        row.nonzero().flatten().tolist() for row in op.selector.choose(tokens, count + torch.tensor([1, 0, 0, 0, 0]))
    ]
    # the code rounds down and loses a token of 65, which goes to the whole picture here
    assert sum(map(len, more)) == 65 and more[0] == sorted(by_eye.best(late[0].sum(0), 33)) and more[1:] == kept[1:]


def test_tiles_too_small_for_their_quota_leave_it_to_the_whole_picture_and_then_to_others():
    attention = torch.arange(8.0)  # the voters lie in the second of two crops
    method = Hired(Budget(tokens=6))
    assert method._quotas(attention, 6, [8, 8, 8]) == [3, 0, 3]
    assert method._quotas(attention, 6, [8, 8, 1]) == [5, 0, 1]
    assert method._quotas(attention, 6, [4, 8, 1]) == [4, 1, 1]


def test_bad_input(clear, by_eye, needs_class_token):
    needs_class_token(Hired, "hired")
    with pytest.raises(ModelError) as error:
        Hired(Budget(tokens=9), early=4).program(clear().facts)
    assert str(error.value) == "hired: expected a block of the vision encoder, 0..3; found 4"
    with pytest.raises(ModelError) as error:
        Hired(Budget(tokens=9), whole=1.0).program(clear().facts)
    assert str(error.value) == "hired: expected whole between 0 and 1; found 1.0"
    with pytest.raises(ModelError) as error:
        Hired(Budget(tokens=9))._quotas(torch.rand(36), 9, [36] * 6)
    assert str(error.value) == "hired: expected tiles that divide the 36 patches of a view; found 5"
