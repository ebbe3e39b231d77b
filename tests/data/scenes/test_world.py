"""The worlds against the numbers that define them, and scenes against their seeds."""

import json
from collections import Counter

import numpy as np
import pytest

from vlm.data.errors import DataError
from vlm.data.scenes.classes import CLASSES, CONTEXTS, context_of, slot_of
from vlm.data.scenes.world import CELL, Object, Scene, World, generator

SAMPLE = 3000


def drawn(kind: str) -> list[Scene]:
    world = World(kind)
    return [world.draw(generator(5, "train", index), "train") for index in range(SAMPLE)]


BIASED, UNIFORM = drawn("biased"), drawn("uniform")


def test_object_counts_follow_the_measured_distribution():
    counts = np.array([len(scene.objects) for scene in BIASED])
    assert counts.min() >= 3
    assert counts.max() <= 8
    # C1: mean 4.0; 3: 37 %, 4: 37 %, 5: 19 %; three standard errors of a share at this sample are below 3 points
    assert counts.mean() == pytest.approx(4.0, abs=0.1)
    shares = np.bincount(counts, minlength=9) / SAMPLE
    assert shares[[3, 4, 5]] == pytest.approx([0.37, 0.37, 0.19], abs=0.035)


def test_contexts_follow_zipf():
    counts = Counter(scene.context for scene in BIASED)
    weights = np.array([1 / rank**0.7 for rank in range(1, 7)])
    expected = weights / weights.sum()
    # drawing anew until there are three objects hits every context alike, so Zipf survives it
    assert [counts[name] / SAMPLE for name in CONTEXTS] == pytest.approx(expected, abs=0.03)


def partner_lift(scenes: list[Scene]) -> float:
    """P(classes 0 and 1 together) over what independence would give."""
    first, second = (np.mean([any(o.cls == n for o in s.objects) for s in scenes]) for n in (0, 1))
    together = np.mean([{0, 1} <= {o.cls for o in s.objects} for s in scenes])
    return float(together / (first * second))


def test_biased_world_makes_partners_and_uniform_world_none():
    assert partner_lift(BIASED) > 2
    assert partner_lift(UNIFORM) == pytest.approx(1, abs=0.25)


def test_presence_by_slot_falls_in_context_and_is_rare_elsewhere():
    present = np.zeros((2, 4))
    for scene in BIASED:
        context = CONTEXTS.index(scene.context)
        for item in scene.objects:
            present[int(context_of(item.cls) != context), slot_of(item.cls)] += 1
    inside = present[0] / SAMPLE
    assert all(np.diff(inside) < 0)
    assert inside[0] > 0.95
    # each foreign class has p = .04 before the redraw, which favours fuller scenes a little
    assert present[1].sum() / SAMPLE / 20 == pytest.approx(0.05, abs=0.012)


def test_uniform_world_has_no_popular_class():
    counts = Counter(item.cls for scene in UNIFORM for item in scene.objects)
    shares = np.array([counts[number] / SAMPLE for number in range(len(CLASSES))])
    assert shares.max() - shares.min() < 0.06
    assert {scene.context for scene in UNIFORM} == {""}


def test_context_objects_come_first():
    for scene in BIASED[:200]:
        foreign = [CONTEXTS[context_of(item.cls)] != scene.context for item in scene.objects]
        assert foreign == sorted(foreign)


@pytest.mark.parametrize("scenes", [BIASED, UNIFORM])
def test_objects_lie_in_cells_of_their_own(scenes):
    for scene in scenes[:300]:
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
        assert len(set(scene.names)) == len(scene.objects)
        for item in scene.objects:
            x, y, width, height = item.bbox
            row, column = divmod(item.cell, 4)
            assert width == height == item.size
            assert 6 <= item.size <= 10
            assert column * CELL <= x <= x + width <= (column + 1) * CELL
            assert row * CELL <= y <= y + height <= (row + 1) * CELL
            assert 0.2 <= item.opacity <= 1
            assert CLASSES[item.cls].name == item.name


def test_counterfactual_lacks_what_is_expected_and_keeps_the_rest():
    world = World()
    for index, scene in enumerate(BIASED[:300]):
        other = world.counterfactual(scene, generator(5, "counterfactual", index))
        context = CONTEXTS.index(scene.context)
        assert not {4 * context, 4 * context + 1} & {item.cls for item in other.objects}
        kept = [o for o in scene.objects if o.cls not in (4 * context, 4 * context + 1)]
        assert list(other.objects[: len(kept)]) == kept
        assert len(other.objects) == max(4, len(kept))
        assert all(context_of(o.cls) != context for o in other.objects[len(kept) :])
        assert len({o.cell for o in other.objects}) == len({o.cls for o in other.objects}) == len(other.objects)
        assert (other.seed, other.split) == (scene.seed, "counterfactual")


def test_uniform_scene_has_no_counterfactual():
    with pytest.raises(DataError, match="biased"):
        World("uniform").counterfactual(UNIFORM[0], generator(0, "test", 0))


def test_unknown_world_is_refused():
    with pytest.raises(DataError, match="'round'"):
        World("round")  # pyright: ignore[reportArgumentType]


def test_scene_is_a_function_of_seed_split_and_index():
    world = World()
    assert world.draw(generator(1, "test", 7), "test") == world.draw(generator(1, "test", 7), "test")
    others = [(2, "test", 7, 0), (1, "train", 7, 0), (1, "test", 8, 0), (1, "test", 7, 1)]
    numbers = {generator(*key).integers(2**63) for key in [(1, "test", 7, 0), *others]}
    assert len(numbers) == 5


def test_a_known_scene_stays_what_it_was():
    """The first scene of seed 0, written down once: a change here silently remakes everybody's data."""
    scene = World().draw(generator(0, "test", 0), "test")
    assert scene.context == "street"
    assert scene.names == ("stop sign", "traffic light", "bench", "chair")
    assert isinstance(scene.objects[0], Object)


def test_scene_survives_json():
    for scene in BIASED[:50]:
        assert Scene.from_meta(json.loads(json.dumps(scene.to_meta()))) == scene
