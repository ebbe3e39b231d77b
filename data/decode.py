"""From the bytes of an image file to RGB pixels, without trusting the file.

Four well-known formats, size limits read from the header before a pixel is decoded, and one error type that names the
sample. PIL alone: checking and indexing shards does not import torch.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from vlm.data.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_EXTENSION_OF = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp"}
_WHITE = (255, 255, 255, 255)
# What PIL's readers of these formats raise on a damaged file.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class ImageLimits:
    """Images outside these bounds are refused before decoding; 89 478 485 pixels are 256 MiB of RGB, PIL's bound."""

    min_side: int = 2
    max_pixels: int = 89_478_485


def image_size(content: bytes, key: str) -> tuple[int, int]:
    """(width, height) as stored, from the header alone. Raises DataError if it is no image of a known format."""
    with _opened(content, key) as image:
        return image.size


def image_extension(content: bytes, key: str) -> str:
    """The extension that fits the content, whatever the file was called. Raises DataError."""
    with _opened(content, key) as image:
        return _EXTENSION_OF[image.format or ""]


def decode_image(content: bytes, key: str, limits: ImageLimits | None = None) -> Image.Image:
    """The picture as seen: turned as EXIF says, palettes resolved, transparency on white, 16 bit brought to 8, RGB.

    Raises:
        DataError: no image, damaged, or outside the limits; names the sample `key`.
    """
    with _opened(content, key) as image:
        _check_size(image.size, key, limits or ImageLimits())
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


@contextmanager
def _opened(content: bytes, key: str) -> Iterator[Image.Image]:
    bound = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # our own limit, checked next, names the sample and the size
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        yield image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        start = content[:8].hex(" ") or "nothing"
        raise DataError(f"sample {key}: image: expected png, jpg, webp or bmp, found bytes {start}") from None
    except _DAMAGED as error:
        raise DataError(f"sample {key}: image: expected a whole image, found damage: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _check_size(size: tuple[int, int], key: str, limits: ImageLimits) -> None:
    width, height = size
    found = f"found {width} x {height}"
    if min(size) < limits.min_side:
        raise DataError(f"sample {key}: image: expected sides of at least {limits.min_side} pixels, {found}")
    if width * height > limits.max_pixels:
        raise DataError(f"sample {key}: image: expected at most {limits.max_pixels} pixels, {found}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
