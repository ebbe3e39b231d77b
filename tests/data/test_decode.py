"""Decoding: bad files named before a pixel is decoded, and every kind of good file as a person sees it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm.data.decode import ImageLimits, decode_image, image_extension, image_size
from vlm.data.errors import DataError


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    coded = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image: expected png, jpg, webp or bmp, found bytes nothing"),
        (b"GIF89a....", "image: expected png, jpg, webp or bmp, found bytes 47 49 46"),
        (b"<svg xmlns='x'/>", "image: expected png, jpg, webp or bmp"),
        (encoded(Image.new("RGB", (1, 1))), "image: expected sides of at least 2 pixels, found 1 x 1"),
        (encoded(Image.new("RGB", (9, 1))), "image: expected sides of at least 2 pixels, found 9 x 1"),
        (png_header(20000, 20000), "image: expected at most 89478485 pixels, found 20000 x 20000"),
        (encoded(Image.effect_noise((64, 64), 90))[:500], "image: expected a whole image, found damage"),
        (encoded(Image.effect_noise((64, 64), 90), "jpeg")[:300], "image: expected a whole image, found damage"),
    ],
)
def test_bad_images_are_named(content: bytes, message: str):
    with pytest.raises(DataError, match=f"^sample some/key: {message}"):
        decode_image(content, "some/key")


def test_limits_can_be_set_beyond_the_limit_of_pil():
    assert image_size(png_header(20000, 20000), "k") == (20000, 20000)
    with pytest.raises(DataError, match="found damage"):  # past the limits, and only there, pixels are decoded
        decode_image(png_header(64, 64), "k", ImageLimits(max_pixels=64 * 64))
    with pytest.raises(DataError, match="expected at most 100 pixels, found 11 x 10"):
        decode_image(encoded(Image.new("L", (11, 10))), "k", ImageLimits(max_pixels=100))


def test_the_global_limit_of_pil_is_left_alone():
    before = Image.MAX_IMAGE_PIXELS
    image_size(encoded(Image.new("L", (3, 3))), "k")
    assert before is not None and before == Image.MAX_IMAGE_PIXELS


def colour(content: bytes) -> tuple[int, ...]:
    image = decode_image(content, "k")
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


def test_palette_grey_and_transparency():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert colour(encoded(red.convert("P"))) == (255, 0, 0)
    assert colour(encoded(red, "bmp")) == (255, 0, 0)
    assert colour(encoded(red, "webp", lossless=True)) == (255, 0, 0)
    assert colour(encoded(Image.new("L", (4, 4), 7))) == (7, 7, 7)
    assert colour(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert colour(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert colour(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 51)))) == (204, 204, 204)
    assert colour(encoded(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    assert colour(encoded(Image.new("P", (4, 4), 0), transparency=0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness():
    grey = Image.fromarray(np.full((4, 4), 0x8001, np.uint16))
    assert grey.mode == "I;16" and colour(encoded(grey)) == (0x80, 0x80, 0x80)


def test_exif_orientation_turns_the_picture():
    picture = Image.new("RGB", (8, 4), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    content = encoded(picture, "jpeg", exif=exif)
    assert image_size(content, "k") == (8, 4) and decode_image(content, "k").size == (4, 8)


@pytest.mark.parametrize(("kind", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp"), ("bmp", "bmp")])
def test_the_extension_follows_the_content(kind: str, extension: str):
    assert image_extension(encoded(Image.new("RGB", (3, 3)), kind), "k") == extension
