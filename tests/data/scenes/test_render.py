"""Pictures against their seeds, and against a pixel-by-pixel statement of what a glyph is."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm.data.scenes.classes import CLASSES, COLOURS, SHAPES
from vlm.data.scenes.render import glyph_mask, png, render
from vlm.data.scenes.world import Object, Scene, World, generator

SCENE = World().draw(generator(3, "test", 0), "test")


def one_object(number: int, opacity: float) -> Scene:
    item = Object(CLASSES[number].name, number, 5, (14, 13, 9, 9), opacity, 9)
    return Scene((item,), "", "test", 99)


def test_same_scene_same_pixels():
    restored = Scene.from_meta(json.loads(json.dumps(SCENE.to_meta())))
    assert np.array_equal(render(SCENE), render(restored))
    assert not np.array_equal(render(SCENE), render(replace(SCENE, seed=SCENE.seed + 1)))


def test_picture_is_rgb_bytes():
    picture = render(SCENE)
    assert picture.shape == (48, 48, 3)
    assert picture.dtype == np.uint8


def test_png_keeps_every_pixel():
    with Image.open(io.BytesIO(png(SCENE))) as image:
        assert np.array_equal(np.asarray(image), render(SCENE))


def test_empty_scene_is_noisy_grey():
    pictures = np.stack([render(Scene((), "", "test", seed)) for seed in range(40)]) / 255
    means = pictures.mean(axis=(1, 2, 3))
    assert 0.24 < means.min() < 0.30
    assert 0.40 < means.max() < 0.46
    assert pictures.std(axis=(1, 2, 3)) == pytest.approx(np.full(40, 0.10), abs=0.005)


@pytest.mark.parametrize("number", range(len(CLASSES)))
def test_opaque_glyph_has_its_colour_inside_and_nothing_outside(number):
    empty = render(Scene((), "", "test", 99)).astype(float) / 255
    change = render(one_object(number, 1.0)).astype(float) / 255 - empty
    box = change[13:22, 14:23]
    mask = glyph_mask(SHAPES[number // 4], 9)
    assert not change[np.ix_(range(13), range(48))].any()
    assert not box[~mask].any()
    background = empty.mean()
    # clipping at 0 and 1 takes a few hundredths from saturated channels
    assert box[mask].mean(axis=0) == pytest.approx(np.array(COLOURS[number % 4]) - background, abs=0.08)


def test_opacity_scales_the_change():
    empty = render(Scene((), "", "test", 99)).astype(float)
    faint, strong = (np.abs(render(one_object(0, a)).astype(float) - empty).sum() for a in (0.25, 0.5))
    assert strong / faint == pytest.approx(2, rel=0.05)


def test_glyphs_differ_at_every_size():
    for side in range(6, 11):
        masks = [glyph_mask(shape, side) for shape in SHAPES]
        assert len({mask.tobytes() for mask in masks}) == len(SHAPES)
        assert all(mask.sum() >= side for mask in masks)
