"""Pictures of "Do You See Me": what is on them is checked on the pixels, answers against the specifications."""

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.data.doyouseeme.make import make, spec_of
from vlm.data.doyouseeme.options import CLOSURE_SHAPES, pieces
from vlm.data.doyouseeme.shapes import LETTERS, SHAPES, corners, outline, raster
from vlm.data.doyouseeme.tasks import TASKS
from vlm.data.errors import DataError

OPTIONS = ("visual_figure_ground", "visual_form_constancy", "visual_closure")
PICTURES = {  # of the original, task by task: pictures, and questions where they differ
    "visual_spatial": 270, "geometric_dataset": 240, "color_and_shape_disambiguation": 90,
    "letter_disambiguation": 135, "visual_figure_ground": 90, "visual_form_constancy": 270, "visual_closure": 168,
}  # fmt: skip


def some(task: str, count: int = 12) -> list[dict]:
    """Specifications spread over the sweep."""
    numbers = np.linspace(0, len(TASKS[task].sweep) - 1, count).astype(int)
    return [spec_of(TASKS[task], 0, int(number), 0) for number in numbers]


def pixels(task: str, spec: dict) -> np.ndarray:
    return np.asarray(TASKS[task].render(spec).convert("L"))


def test_the_sweeps_are_those_of_the_original():
    assert {name: len(list(task.settings(None))) for name, task in TASKS.items()} == PICTURES


@pytest.mark.parametrize("task", TASKS)
def test_a_specification_is_json_that_draws_the_same_picture(task):
    for spec in some(task, 4):
        again = json.loads(json.dumps(spec))
        assert again == spec
        first = TASKS[task].render(spec)
        assert first.size == (400, 400)
        assert first.tobytes() == TASKS[task].render(again).tobytes()
        assert TASKS[task].ask(again) == TASKS[task].ask(spec)


def test_pictures_have_streams_of_their_own():
    task = TASKS["geometric_dataset"]
    assert spec_of(task, 0, 3, 1) == spec_of(task, 0, 3, 1)
    seen = [spec_of(task, *place) for place in ((0, 3, 1), (1, 3, 1), (0, 3, 2), (0, 4, 1))]
    assert all(a != b for a, b in itertools.combinations(seen, 2))


def test_grids_show_what_they_say():
    """Black or white at the middle of every cell, where every shape is filled."""
    for spec in some("visual_spatial"):
        grey = pixels("visual_spatial", spec)
        count = len(spec["grids"])
        across = {1: 1, 3: 2, 5: 3}[count]
        width, height = 400 / across, 400 / -(-count // across)
        for number, grid in enumerate(spec["grids"]):
            cell = min((width - 12) / len(grid[0]), (height - 28) / len(grid))
            for row, column in itertools.product(range(len(grid)), range(len(grid[0]))):
                x = number % across * width + 6 + (column + 0.5) * cell
                y = number // across * height + 22 + (row + 0.5) * cell
                assert (grey[round(y), round(x)] < 128) == (grid[row][column][1] == "black")


def test_counts_along_a_line():
    """Counted again with slices of an array, from the words of the question."""
    for spec in some("visual_spatial"):
        for (grid, row, column, direction, (shape, fill)), (question, answer) in zip(
            spec["asked"], TASKS["visual_spatial"].ask(spec), strict=True
        ):
            cells = np.array(spec["grids"][grid])
            line = {
                "left": cells[row, :column], "right": cells[row, column + 1 :],
                "up": cells[:row, column], "down": cells[row + 1 :, column],
            }[direction]  # fmt: skip
            fits = [(shape in (None, s)) and (fill in (None, f)) for s, f in line]
            assert answer == str(sum(fits))
            assert f"(row {row + 1}, column {column + 1})" in question and f" {direction} of it" in question
            assert f"starting from the {cells[row, column][1]} {cells[row, column][0]} at" in question


def test_outlines_keep_their_distance_and_are_counted_with_their_rings():
    for setting, spec in zip(TASKS["geometric_dataset"].sweep, some("geometric_dataset", 24), strict=True):
        kinds, count, gap = setting
        assert len(spec["placed"]) == count
        assert len({one["shape"] for one in spec["placed"]}) <= kinds
        for a, b in itertools.combinations(spec["placed"], 2):
            distance = np.hypot(a["x"] - b["x"], a["y"] - b["y"])
            assert distance >= max(a["radius"] + b["radius"] + gap, 0.55 * (a["radius"] + b["radius"])) - 0.02
        [(question, answer)] = TASKS["geometric_dataset"].ask(spec)
        assert int(answer) == sum(one["rings"] for one in spec["placed"] if f"of {one['shape']}s in" in question) > 0
        grey = pixels("geometric_dataset", spec)
        for one in spec["placed"]:  # the outermost line crosses the ray from the centre to its first corner
            x, y = outline(one["shape"], one["x"], one["y"], one["radius"])[0]
            assert grey[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].min() < 128


def test_filled_shapes_have_their_colours():
    task, rgb = TASKS["color_and_shape_disambiguation"], {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
    for setting, spec in zip(task.sweep, some(task.name, 9), strict=True):
        per_shape = Counter(one["shape"] for one in spec["placed"])
        assert len(per_shape) == setting[0] and max(per_shape.values()) <= setting[1]
        picture = task.render(spec)
        for one in spec["placed"]:
            expected = rgb.get(one["colour"])
            assert expected is None or picture.getpixel((round(one["x"]), round(one["y"]))) == expected
        asked = task.ask(spec)
        assert len(set(asked)) == len(asked) <= 5
        for question, answer in asked:
            hits = [o for o in spec["placed"] if f" {o['shape']}'s that are {o['colour']}." in question]
            assert answer == str(len(hits)) != "0"


def test_letters_are_darker_than_their_ground():
    for setting, spec in zip(TASKS["letter_disambiguation"].sweep, some("letter_disambiguation", 27), strict=True):
        assert len(spec["letters"]) == setting[0]
        grey = pixels("letter_disambiguation", spec)
        across = min(3, setting[0])
        down = -(-setting[0] // 3)
        pitch = min(392 / (7 * across), 392 / (9 * down))
        left, top = (400 - 7 * across * pitch) / 2, (400 - 9 * down * pitch) / 2
        for place, letter in enumerate(spec["letters"]):
            dark = {
                (row, column)
                for row, column in itertools.product(range(9), range(7))
                if grey[
                    int(top + (place // 3 * 9 + row + 0.5) * pitch), int(left + (place % 3 * 7 + column + 0.5) * pitch)
                ]
                < 180
            }
            assert dark == {(row + 1, column + 1) for row, column in raster(letter)}


def test_no_two_letters_are_alike():
    assert len({tuple(raster(letter)) for letter in LETTERS}) == 26
    for a, b in itertools.combinations(LETTERS, 2):
        assert len(set(raster(a)) ^ set(raster(b))) >= 2, (a, b)


def panel(grey: np.ndarray, option: int) -> np.ndarray:
    """The field of an option, counted from 1, without its frame."""
    left = (8, 106, 204, 302)[option - 1]
    return grey[252:338, left + 2 : left + 88].astype(int)


@pytest.mark.parametrize("task", OPTIONS)
def test_one_option_is_the_target_and_the_others_look_different(task):
    answers = []
    for spec in some(task, 27):
        grey = pixels(task, spec)
        answers.append(spec["answer"])
        right = panel(grey, spec["answer"])
        for option in {1, 2, 3, 4} - {spec["answer"]}:
            assert np.abs(panel(grey, option) - right).sum() > 1000, (task, option)
        if "target" in spec:
            assert spec["options"][spec["answer"] - 1] == spec["target"]
            assert [one == spec["target"] for one in spec["options"]].count(True) == 1
    assert set(answers) == {1, 2, 3, 4}


def test_the_right_option_is_the_target_made_small():
    """Drawn at one size they are the same pixels: the target panel shrunk lies on the option's lines."""
    for spec in some("visual_form_constancy", 8):
        picture = TASKS["visual_form_constancy"].render(spec).convert("L")
        small = picture.crop((110, 10, 290, 190)).resize((90, 90), Image.Resampling.BOX)
        target = np.asarray(small)[2:88, 2:88].astype(int)
        grey = np.asarray(picture)
        distances = [np.abs(panel(grey, option) - target).mean() for option in (1, 2, 3, 4)]
        assert int(np.argmin(distances)) + 1 == spec["answer"]


def test_noise_lies_on_the_target_alone():
    for setting, spec in zip(TASKS["visual_figure_ground"].sweep, some("visual_figure_ground", 9), strict=True):
        assert len(spec["noise"]) == round(120 * setting[1])
        without = pixels("visual_figure_ground", {**spec, "noise": []})
        changed = np.argwhere(pixels("visual_figure_ground", spec) != without)
        assert len(changed)
        assert (changed.min(0) >= (8, 108)).all() and (changed.max(0) <= (192, 292)).all()


def test_closure_leaves_out_pieces_and_moves_others():
    for setting, spec in zip(TASKS["visual_closure"].sweep[::7], some("visual_closure", 168)[::7], strict=True):
        shape, offset, moved, whole, half = setting
        assert spec["shape"] == shape
        for number, option in enumerate(spec["options"], start=1):
            assert (len(option["whole"]), len(option["half"])) == (whole, half)
            assert len(option["shifts"]) == (0 if number == spec["answer"] else moved)
            assert all(abs(d) == offset for shift in option["shifts"].values() for d in shift)
            gone = {*option["whole"], *option["half"]}
            for place in map(int, option["shifts"]):  # one side of a moved point is always drawn whole
                assert not {place, (place - 1) % len(pieces(shape))} <= gone


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_of_radius_one(shape):
    points = np.array(corners(shape))
    assert np.hypot(*points.T).max() == pytest.approx(1, abs=0.14)
    turned = np.array(outline(shape, 10, 20, 5, turn=90))
    assert turned == pytest.approx(np.stack([10 - 5 * points[:, 1], 20 + 5 * points[:, 0]], 1))
    if shape in CLOSURE_SHAPES:
        assert len(pieces(shape)) >= 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(
        tmp_path_factory.mktemp("data") / "see", seed=3, tasks=["visual_figure_ground", "visual_spatial"], repeats=1
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_has_pictures_questions_and_specifications(folder):
    rows = list(csv.DictReader((folder / "visual_spatial" / "dataset_info.csv").open()))
    assert len(rows) == 27 * 3
    assert list(rows[0]) == ["filename", "question", "answer", "sweep"]
    assert rows[0]["sweep"] == "(3, 3, 1)"
    specs = [json.loads(line) for line in (folder / "visual_spatial" / "specs.jsonl").read_text().splitlines()]
    assert [spec.pop("filename") for spec in specs] == [f"{k}.png" for k in range(27)]
    with Image.open(folder / "visual_spatial" / "5.png") as image:
        assert image.tobytes() == TASKS["visual_spatial"].render(specs[5]).tobytes()
    header = (folder / "visual_figure_ground" / "dataset_info.csv").read_text().splitlines()[0]
    assert header == "filename,answer,sweep"


def test_the_same_again_does_nothing_and_other_arguments_make_it_anew(tmp_path):
    calls = []
    arguments = {"seed": 0, "tasks": ["visual_figure_ground"], "repeats": 1}
    made = make(tmp_path / "see", **arguments, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 9) for k in range(1, 10)]
    before = contents(made)
    make(made, **arguments, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 9 and contents(made) == before
    assert contents(make(tmp_path / "again", **arguments)) == before
    assert contents(make(made, **{**arguments, "seed": 1})) != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_bad_arguments_are_one_line(tmp_path):
    for arguments, message in (
        ({"seed": -1}, "seed: expected at least 0, found -1"),
        ({"seed": 0, "repeats": 0}, "repeats: expected at least 1 or null, found 0"),
        ({"seed": 0, "tasks": ["visual_closer"]}, r"task 'visual_closer'.*nearest: visual_closure"),
        ({"seed": 0, "tasks": []}, "tasks: expected some of"),
    ):
        with pytest.raises(DataError, match=message):
            make(tmp_path / "see", **arguments)
    (tmp_path / "see").mkdir()
    (tmp_path / "see" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something else"):
        make(tmp_path / "see", seed=0)
    assert (tmp_path / "see" / "thesis.txt").read_text() == "mine"
