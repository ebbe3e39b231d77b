"""OPOPE: captions answer POPE's questions."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.pope_builder import SPLITS, Labelled, build_pope
from vlm.data.benchmarks.opope import Opope
from vlm.data.errors import DataError

IMAGES = [
    Labelled("0.jpg", ("dog", "cat", "car")),
    Labelled("1.jpg", ("bus", "dog", "kite")),
    Labelled("2.jpg", ("person", "car", "stop sign")),
    Labelled("3.jpg", ("kite", "person", "cat")),
]


@pytest.fixture
def files(tmp_path):
    paths = []
    for split in SPLITS:
        path = tmp_path / f"coco_pope_{split}.json"
        path.write_text("".join(json.dumps(r) + "\n" for r in build_pope(IMAGES, split)))
        paths.append(str(path))
    return paths


def test_perfect_captions(files):
    opope = Opope(files, "images")
    assert isinstance(opope, Benchmark)
    assert [(q.id, q.images) for q in opope.ask()] == [(f"{k}.jpg", (f"{k}.jpg",)) for k in range(4)]
    scores = opope.score({image.image: ", ".join(f"a {name}" for name in image.objects) for image in IMAGES})
    assert list(scores) == list(SPLITS)
    for values in scores.values():
        assert [values[k] for k in ("accuracy", "precision", "recall", "f1", "f_beta", "yes_ratio")] == [
            1,
            1,
            1,
            1,
            1,
            0.5,
        ]
        assert values["n"] == 24


def test_short_captions_lose_recall_and_no_precision(files):
    scores = Opope(files, "i").score({image.image: f"one {image.objects[0]} here" for image in IMAGES})["random"]
    assert (scores["precision"], scores["recall"], scores["accuracy"]) == (1.0, 1 / 3, (4 + 12) / 24)
    assert scores["f_beta"] == pytest.approx(1.04 * (1 / 3) / (0.04 + 1 / 3))
    assert scores["f_beta"] > scores["f1"]
    assert scores["ci_precision"] == [1.0, 1.0]
    silent = Opope(files, "i").score(dict.fromkeys((image.image for image in IMAGES), ""))["random"]
    assert (silent["accuracy"], silent["precision"], silent["yes_ratio"]) == (0.5, 0, 0)


def test_naming_what_is_absent_costs_precision(files):
    opope = Opope(files[:1], "i")
    absent = {}
    for line in open(files[0]):  # noqa: SIM115, PTH123
        record = json.loads(line)
        if record["label"] == "no":
            absent.setdefault(record["image"], record["text"])
    answers = {image.image: f"a {image.objects[0]}" for image in IMAGES}
    worse = {image: f"{text} and {absent[image].removeprefix('Is there ')}" for image, text in answers.items()}
    before, after = opope.score(answers)["random"], opope.score(worse)["random"]
    assert (before["precision"], after["precision"]) == (1.0, 0.5)
    change = opope.compare(answers, worse)["random"]
    assert change["precision"]["difference"] == -0.5
    assert change["accuracy"]["difference"] == pytest.approx(-4 / 24)


def test_recall_is_the_same_in_every_split(files):
    scores = Opope(files, "i").score({image.image: "a dog and a kite" for image in IMAGES})
    assert len({values["recall"] for values in scores.values()}) == 1


def test_card(files):
    card = Opope(files, "i", beta=0.5).protocol()["popular"]
    assert (card["beta"], card["n"], len(card["files"])) == (0.5, 24, 4)


def test_bad_input_is_one_line(files, tmp_path):
    path = tmp_path / "pope_random.json"
    path.write_text('{"question_id": 1, "image": "a", "text": "Is there a dragon in the image?", "label": "no"}')
    with pytest.raises(DataError, match=r"random/1 .*expected one object of coco_synonyms.txt, found none"):
        Opope([str(path)], "i").ask()
    with pytest.raises(DataError, match="beta: expected a positive number, found 0"):
        Opope(files, "i", beta=0)
    with pytest.raises(DataError, match="opope: questions: expected a list"):
        Opope(files[0], "i")
    with pytest.raises(DataError, match=r"opope: 4 of 4 questions have no answer"):
        Opope(files, "i").score({})
