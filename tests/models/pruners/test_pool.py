"""Average pooling against torch's, and cells on any grid and any count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import Tokens
from vlm.models.pruners.pool import Pool, _cells_of_image, _means, _middles


@pytest.mark.parametrize(("keep", "side"), [(9, 2), ("11.1%", 3)])
def test_equals_average_pooling_where_the_count_allows(make_model, batch, by_eye, keep, side):
    model, inputs, entered = make_model(), batch("t#t#", "#t"), []
    with torch.no_grad():
        projected = model.connector(model.vision(inputs.images).tokens, (6, 6))
        expected = avg_pool2d(projected.transpose(1, 2).unflatten(2, (6, 6)), side).flatten(2).transpose(1, 2)
        handle = model.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with attach(model, Pool(Budget.parse(keep)).program(model.facts)):
            layout = model(inputs).layout
        handle.remove()
    [x] = entered
    # the middle one of three by three, the third of two by two
    middle = [
        r * 6 + c for r in range(side // 2, 6, side) for c in range(side % 2, 6, side)
    ]  # of two by two: the third
    for n in range(3):
        torch.testing.assert_close(x[layout.image == n], expected[n], rtol=0, atol=1e-12)
        assert by_eye.places(layout, n) == middle


def test_counts_that_do_not_divide():
    row, col = torch.arange(36) // 6, torch.arange(36) % 6
    five = _cells_of_image(row, col, 5).reshape(6, 6).tolist()  # two bands of three and two cells
    assert five == [[0, 0, 1, 1, 2, 2]] * 3 + [[3, 3, 3, 4, 4, 4]] * 3
    assert _cells_of_image(row, col, 36).tolist() == list(range(36))
    assert _cells_of_image(row, col, 1).tolist() == [0] * 36
    wide = _cells_of_image(torch.arange(16) // 8, torch.arange(16) % 8, 4).reshape(2, 8).tolist()
    assert wide == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_any_count_gives_as_many_cells_of_neighbours(rows, columns, data):
    count = data.draw(st.integers(1, rows * columns))
    cell = _cells_of_image(torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns, count)
    assert sorted(set(cell.tolist())) == list(range(count))
    grid = cell.reshape(rows, columns)
    for number in range(count):
        there = (grid == number).nonzero()
        (top, left), (bottom, right) = there.amin(0).tolist(), there.amax(0).tolist()
        assert bool((grid[top : bottom + 1, left : right + 1] == number).all())  # a rectangle
    assert int(cell.bincount().max()) <= 4 * max(1, rows * columns // count) + 4


def test_images_of_a_sample_are_pooled_apart_and_padding_not_at_all():
    image = torch.tensor([[0, 0, 0, 0, 1, 1, -1], [2, 2, 2, -1, -1, -1, -1]])
    valid, place = image >= 0, torch.tensor([[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 0, 0, 0, 0]])
    x = torch.where(valid[..., None], torch.arange(14.0).reshape(2, 7, 1), torch.nan)
    total, images = valid.sum(1), torch.tensor([2, 1])
    tokens = Tokens(x, valid, lambda: total, lambda signal: x, total, images, image, place * 0, place)
    kept = _middles(tokens, torch.tensor([3, 1]))
    found = _means(tokens, kept, torch.tensor([3, 1]))
    assert found.place[0].tolist() == [1, 3, 5] and found.place[1, :1].tolist() == [1]
    assert found.features[0, :, 0].tolist() == [0.5, 2.5, 4.5] and found.features[1, 0, 0] == 8
    assert found.valid.tolist() == [[True] * 3, [True, False, False]]
    assert found.size is not None and found.size.tolist() == [[2, 2, 2], [3, 0, 0]]


def test_several_grids_in_one_image_are_pooled_in_runs():
    # a wide grid below a narrow one, as an image in tiles has it: cells would leave holes
    row = torch.tensor([0, 0, 1, 1, *[2] * 8])
    col = torch.tensor([0, 1, 0, 1, *range(8)])
    cell = _cells_of_image(row, col, 6)
    assert cell.tolist() == [i * 6 // 12 for i in range(12)]
