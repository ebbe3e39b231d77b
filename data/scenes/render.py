"""A scene as a picture: faint coloured glyphs on noisy grey.

Each glyph is blended into the background with its opacity, then Gaussian noise covers everything; at opacity 0.2 a
glyph is about as strong as the noise. Background and noise come from `Scene.seed` alone (PCG64), so a scene read back
from a shard renders to the same bytes.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from vlm.data.scenes.classes import COLOURS, SHAPES, context_of, slot_of
from vlm.data.scenes.world import SIZE, Scene

BACKGROUND = (0.25, 0.45)
NOISE = 0.10


@cache
def glyph_mask(shape: str, side: int) -> Bool[np.ndarray, "{side} {side}"]:
    """The pixels of a shape in its box."""
    y, x = np.mgrid[0:side, 0:side]
    centre = (side - 1) / 2
    distance = np.hypot(x - centre, y - centre)
    masks = {
        "disk": distance <= side / 2,
        "square": np.ones((side, side), bool),
        "triangle": np.abs(x - centre) <= (y + 1) / 2,
        "cross": np.minimum(np.abs(x - centre), np.abs(y - centre)) <= side / 6,
        "ring": (distance <= side / 2) & (distance >= 0.55 * side / 2),
        "bar": np.abs(y - centre) <= side / 5,
    }
    return masks[shape]


@cache
def _glyph(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(coverage [side, side, 1], colour times coverage [side, side, 3]), both float32."""
    mask = glyph_mask(SHAPES[context_of(number)], side).astype(np.float32)[..., None]
    return mask, mask * np.array(COLOURS[slot_of(number)], np.float32)


def render(scene: Scene) -> UInt8[np.ndarray, "48 48 3"]:
    """The picture: height, width, RGB."""
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    picture = np.full((SIZE, SIZE, 3), rng.uniform(*BACKGROUND), np.float32)
    for item in scene.objects:
        x, y, width, height = item.bbox
        mask, colour = _glyph(item.cls, item.size)
        patch = picture[y : y + height, x : x + width]
        patch *= 1 - np.float32(item.opacity) * mask
        patch += np.float32(item.opacity) * colour
    picture += np.float32(NOISE) * rng.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(picture, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def png(scene: Scene) -> bytes:
    """The picture as a PNG file; compression 1, since noise does not compress and time counts."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
