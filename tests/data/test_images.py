import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from vlm.data.errors import DataError
from vlm.data.images import ImageTransform, tile_grid


def test_a_picture_that_fits_is_only_normalised():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    tensor = ImageTransform((3, 5), mean, std)(Image.fromarray(pixels))
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 3, 5)
    assert np.allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.sampled_from(["stretch", "pad", "crop"]))
def test_every_picture_gets_the_size(width: int, height: int, resize: str):
    transform = ImageTransform((6, 9), resize=resize)  # pyright: ignore[reportArgumentType]
    tensor = transform(Image.new("RGB", (width, height), (255, 255, 255)))
    assert tensor.shape == (3, 6, 9)
    assert tensor.max() == 1


def test_pad_keeps_the_shape_and_fills_with_the_mean():
    wide = Image.new("RGB", (8, 4), (255, 255, 255))
    fitted = np.asarray(ImageTransform((8, 8), mean=(0.0, 0.4, 1.0), resize="pad").fit(wide))
    assert (fitted[2:6] == 255).all() and (fitted[:2] == (0, 102, 255)).all() and (fitted[6:] == (0, 102, 255)).all()


def test_crop_cuts_the_sides_evenly():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    fitted = ImageTransform((4, 4), resize="crop", interpolation="nearest").fit(Image.fromarray(pixels))
    assert (np.asarray(fitted) == 255).all()


def test_stretch_uses_the_whole_picture():
    pixels = np.zeros((2, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    fitted = np.asarray(ImageTransform((2, 2), interpolation="nearest").fit(Image.fromarray(pixels)))
    assert fitted[:, 0].max() == 0 and fitted[:, 1].min() == 255


def test_unknown_words_are_refused():
    with pytest.raises(DataError, match="resize: expected one of stretch, pad, crop, found 'squash'"):
        ImageTransform((2, 2), resize="squash")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="std above 0"):
        ImageTransform((2, 2), std=(0.0, 1.0, 1.0))


sides = st.integers(8, 1200)


@settings(max_examples=100, deadline=None)
@given(sides, sides, st.sampled_from([16, 37, 64]), st.integers(1, 6))
def test_the_tile_grid_is_the_one_of_llava_next(height: int, width: int, side: int, most: int):
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
    found = tile_grid(height, width, (side, side), most)
    assert found in grids
    # Transformers rounds a product of floats down, so a picture that fits exactly may lose a row there
    chosen = select_best_resolution((height, width), [(r * side, c * side) for r, c in grids])

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] * side / height, grid[1] * side / width)
        kept = min(int(height * scale + 1e-9) * int(width * scale + 1e-9), height * width)
        return kept, -grid[0] * grid[1]

    assert worth(found) == max(map(worth, grids))
    assert found == (chosen[0] // side, chosen[1] // side) or worth(found) >= worth(
        (chosen[0] // side, chosen[1] // side)
    )


def test_tiles_put_together_are_the_picture_in_their_frame():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 130, 3), dtype=np.uint8)
    shown, mean = Image.fromarray(pixels), (0.0, 0.4, 1.0)
    transform = ImageTransform((32, 32), mean, max_tiles=6)
    found = transform.views(shown)
    assert found.tiles == (2, 3, 50, 130) and found.pixels.shape == (7, 3, 32, 32)
    assert np.array_equal(found.pixels[0], transform(shown))
    joined = np.block([[found.pixels[1 + r * 3 + c].numpy() for c in range(3)] for r in range(2)])
    frame = ImageTransform((64, 96), mean, resize="pad")(shown)
    assert np.array_equal(joined, frame.numpy())


@pytest.mark.parametrize(("width", "height"), [(32, 32), (20, 31), (40, 40)])
def test_a_picture_that_one_tile_shows_as_well_gets_none(width: int, height: int):
    # of 40 x 40 two tiles show no more than one does
    found = ImageTransform((32, 32), max_tiles=2).views(Image.new("RGB", (width, height)))
    assert found.tiles == (0, 0, height, width) and len(found.pixels) == 1


def test_without_tiling_a_picture_is_one_view():
    shown, transform = Image.new("RGB", (90, 30), (9, 8, 7)), ImageTransform((32, 32))
    found = transform.views(shown)
    assert found.tiles is None and np.array_equal(found.pixels, transform(shown)[None])


def test_a_negative_number_of_tiles_is_refused():
    with pytest.raises(DataError, match="max_tiles of at least 0, found -1"):
        ImageTransform((2, 2), max_tiles=-1)
