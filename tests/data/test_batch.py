import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.batch import Example, blank_example, collate
from vlm.data.errors import DataError


def example(key: str, tokens: list[int], images: int, fill: float = 0.0, size: int = 2) -> Example:
    weights = [0.0, *(1.0 for _ in tokens[1:])]
    return Example(key, tokens, weights, torch.full((images, 3, size, size), fill), (f"tag {key}",))


rows_of_tokens = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3)), min_size=1, max_size=5)
)
def test_every_row_holds_its_example(given_rows: list[tuple[list[int], int]]):
    examples = [example(str(n), tokens, images, float(n)) for n, (tokens, images) in enumerate(given_rows)]
    batch = collate(examples, pad_id=7)
    width = max(len(tokens) for tokens, _ in given_rows)
    assert batch.tokens.shape == batch.weights.shape == (len(examples), width)
    for row, one in enumerate(examples):
        length = int(batch.length[row])
        assert batch.tokens[row].tolist() == one.tokens + [7] * (width - length) and length == len(one.tokens)
        assert batch.weights[row].tolist() == one.weights + [0.0] * (width - length)
        own = batch.images[batch.image_owner == row]
        assert len(own) == len(one.images) and (own == float(row)).all()
    assert batch.image_owner.tolist() == sorted(batch.image_owner.tolist())
    assert batch.keys == [one.key for one in examples] and batch.tags == [one.tags for one in examples]


def test_a_blank_stands_among_others_without_a_trace():
    batch = collate([blank_example(5, "bad", 3), example("a", [1, 2], 1)], pad_id=5)
    assert batch.tokens.tolist() == [[5, 5], [1, 2]] and batch.length.tolist() == [1, 2]
    assert batch.weights[0].sum() == 0 and batch.image_owner.tolist() == [1]
    assert batch.images.shape == (1, 3, 2, 2) and batch.keys == ["bad", "a"]
    assert collate([blank_example(5)], 5).images.shape[:2] == (0, 3)


def test_to_moves_every_tensor_and_nothing_else():
    batch = collate([example("a", [1, 2], 1)], 0)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.keys == ["a"] and batch.tokens.device.type == "cpu"


def test_bad_examples_are_named():
    with pytest.raises(DataError, match=r"sample b: image: expected the batch's shape \(3, 2, 2\), found \(3, 4, 4\)"):
        collate([example("a", [1], 1), example("b", [1], 1, size=4)], 0)
    with pytest.raises(DataError, match=r"sample e: expected .*, found 0 and 0"):
        collate([Example("e", [], [], torch.zeros(0, 3, 2, 2))], 0)


def tiled(key: str, *tiles: tuple[int, int, int, int]) -> Example:
    views = [100.0 * n + view for n, (rows, columns, _, _) in enumerate(tiles) for view in range(1 + rows * columns)]
    pixels = torch.tensor(views)[:, None, None, None].expand(-1, 3, 2, 2)
    return Example(key, [1, *(-1 for _ in tiles)], [0.0] * (1 + len(tiles)), pixels, tiles=tiles)


def test_views_of_an_image_count_as_one_image():
    one, two = tiled("a", (1, 2, 30, 90)), tiled("b", (0, 0, 5, 5), (2, 1, 90, 30))
    assert (one.image_count, two.image_count) == (1, 2)
    batch = collate([one, blank_example(0), two], 0)
    assert batch.image_owner.tolist() == [0, 2, 2] and batch.images.shape == (7, 3, 2, 2)
    assert batch.tiles is not None and batch.tiles.tolist() == [[1, 2, 30, 90], [0, 0, 5, 5], [2, 1, 90, 30]]
    assert batch.whole_images[:, 0, 0, 0].tolist() == [0, 0, 100]
    moved = batch.to("meta")
    assert moved.tiles is not None and moved.tiles.device.type == "meta"


def test_without_tiles_whole_images_are_the_images():
    batch = collate([example("a", [1, 2], 2)], 0)
    assert batch.tiles is None and batch.whole_images is batch.images


def test_views_that_are_not_those_of_the_tiles_are_named():
    short = tiled("a", (1, 2, 30, 90))
    short.images = short.images[:2]
    with pytest.raises(DataError, match="sample a: image: expected 3 views for its tiles, found 2"):
        collate([short], 0)
