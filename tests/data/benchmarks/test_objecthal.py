"""Object HalBench with the rule matcher: counts by hand, and where it differs from CHAIR."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks.objecthal import Objecthal
from vlm.data.errors import DataError

TRUTH = {"COCO_val2014_000000000042.jpg": ["dog", "cat"], "b": ["person", "car"]}
QUESTIONS = [
    {"image_id": 42, "question": "Describe it."},
    {"image_id": 42, "question": "What do you see?"},
    {"image_id": "b", "question": "Describe it."},
    {"image_id": "b", "question": "Tell me more."},
]
ANSWERS = {
    "42/1": "a dog and a dog, a puppy and a horse",  # dog, puppy, horse: each word once, one of three wrong
    "42/2": "dog cat horse",  # three words describe nothing
    "b/1": "a man and a woman in a car",  # man, woman, car: all right, person once in recall
    "b/2": "there is nothing to be seen",
}


@pytest.fixture
def build(tmp_path):
    def make(questions=QUESTIONS, truth=TRUTH, **options) -> Objecthal:
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
        (tmp_path / "t.json").write_text(json.dumps(truth))
        return Objecthal(
            str(tmp_path / "q.jsonl"), str(tmp_path / "t.json"), options.pop("images", "images"), **options
        )

    return make


def test_counts_by_hand(build):
    scores = build().score(ANSWERS)[""]
    assert scores["response_hall"] == 1 / 2  # over the two answers that name an object
    assert scores["response_hall_all"] == 1 / 4
    assert scores["object_hall"] == 1 / 6
    assert scores["object_recall"] == (1 + 0 + 2 + 0) / 8
    assert scores["object_f1"] == pytest.approx(2 * (3 / 8) * (5 / 6) / (3 / 8 + 5 / 6))
    assert scores["response_f1"] == pytest.approx(2 * (2 / 4) * (1 / 2) / (2 / 4 + 1 / 2))
    assert (scores["n"], scores["answers"], scores["length"]) == (2, 4, (10 + 3 + 8 + 6) / 4)
    assert scores["ci"][0] < 1 / 2 < scores["ci"][1]
    assert scores["ci_object"][0] <= 1 / 6 <= scores["ci_object"][1]


def test_answers_without_objects_are_zero_with_a_warning(build):
    scores = build().score(dict.fromkeys(ANSWERS, "nothing at all to see"))[""]
    assert (scores["response_hall"], scores["object_hall"], scores["response_f1"]) == (0, 0, 0)
    assert [warning.split()[0] for warning in scores["warnings"]] == ["response_hall", "object_hall"]


def test_questions_and_card(build):
    bench = build()
    assert isinstance(bench, Benchmark)
    questions = bench.ask()
    assert [q.id for q in questions] == list(ANSWERS)
    assert questions[0].images == ("COCO_val2014_000000000042.jpg",)
    card = bench.protocol()[""]
    assert (card["mode"], card["n"], len(card["files"])) == ("OHB-rule", 4, 3)


def test_comparison_is_by_question(build):
    change = build().compare(ANSWERS, {**ANSWERS, "42/1": "a dog and a dog, a puppy and a cat"})[""]
    assert change["response_hall"]["difference"] == -0.5
    assert change["object_recall"]["difference"] == pytest.approx(1 / 8)


def test_the_official_answer_file(build, tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [{"image_id": key.split("/")[0], "prompt": "q", "text": text} for key, text in ANSWERS.items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert score_file(build(images=""), path).scores == build().score(ANSWERS)


def test_bad_files_are_one_line(build):
    with pytest.raises(DataError, match=r"question 1: image '7' is not in"):
        build([{"image_id": 7, "question": "?"}]).ask()
    with pytest.raises(DataError, match=r"question 1 lacks image_id"):
        build([{"question": "?"}]).ask()
    with pytest.raises(DataError, match=r"unknown object 'dragon'"):
        build(truth={"b": ["dragon"]}).ask()
