import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.errors import DataError
from vlm.data.images import ImageTransform


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
