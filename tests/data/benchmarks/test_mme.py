"""MME: scores by hand and by a restatement, the official files both ways, and what can go wrong."""

import random

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks._shared.yes_no import PARSERS
from vlm.data.benchmarks.mme import COGNITION, HALLUCINATION, PERCEPTION, TASKS, Mme, escape, unescape
from vlm.data.errors import DataError

IMAGES = 4


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    for task in TASKS:
        lines = [
            f"{k}.jpg\tIs it {number} in {task}? Please answer yes or no.\t{label}\n"
            for k in range(IMAGES)
            for number, label in enumerate(("Yes", "No"))
        ]
        (folder / f"{task}.txt").write_text("".join(lines))
    return folder


def right(mme: Mme) -> dict[str, str]:
    return {key: label.capitalize() for key, label in mme.labels().items()}


def test_the_tasks_are_fourteen():
    assert (len(TASKS), len(PERCEPTION), len(COGNITION), len(HALLUCINATION)) == (14, 10, 4, 4)
    assert set(HALLUCINATION) < set(PERCEPTION)


def test_right_answers_reach_every_maximum(folder):
    mme = Mme(str(folder), "images")
    scores = mme.score(right(mme))
    assert {name: scores[name]["score"] for name in ("perception", "cognition", "hallucination", "OCR")} == {
        "perception": 2000, "cognition": 800, "hallucination": 800, "OCR": 200,
    }  # fmt: skip
    assert scores["perception"]["maximum"] == 2000
    assert scores["perception"]["n"] == 10 * 2 * IMAGES


def test_a_task_by_hand(folder):
    mme = Mme(str(folder), "images", tasks=["count"])
    answers = right(mme)
    answers |= {"count/0.jpg/2": "Yes", "count/1.jpg/1": "I think so", "count/1.jpg/2": "None"}
    scores = mme.score(answers)["count"]
    # image 0: half; image 1: "I think so" is neither, "None" holds a no within four letters: half; 2 and 3 whole
    assert (scores["accuracy"], scores["accuracy_plus"], scores["unknown"]) == (6 / 8, 2 / 4, 1)
    assert scores["score"] == 100 * 6 / 8 + 100 * 2 / 4
    assert scores["ci"][0] < 6 / 8 < scores["ci"][1]
    assert scores["ci_score"][0] <= scores["score"] <= scores["ci_score"][1]
    assert set(mme.score(answers)) == {"count"}  # no sum over tasks that were not asked


def test_always_yes_scores_fifty_per_task(folder):
    mme = Mme(str(folder), "images")
    scores = mme.score(dict.fromkeys(mme.labels(), "Yes"))
    assert {scores[task]["score"] for task in TASKS} == {50}
    assert scores["hallucination"]["score"] == 200


def test_scores_against_a_restatement(folder):
    mme, rng = Mme(str(folder), "images"), random.Random(1)
    for _ in range(5):
        answers = {key: rng.choice(["Yes", "no", "maybe"]) for key in mme.labels()}
        total = 0.0
        for task in PERCEPTION:
            marks = [
                [answers[f"{task}/{k}.jpg/{n}"].lower() == label for n, label in ((1, "yes"), (2, "no"))]
                for k in range(IMAGES)
            ]
            accuracy = sum(map(sum, marks)) / (2 * IMAGES)
            total += 100 * accuracy + 100 * sum(map(all, marks)) / IMAGES
        assert mme.score(answers)["perception"]["score"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"), ("NO", "no"), ("yes, it is", "yes"), ("No.", "no"), ("a no", "no"), ("It is yes", "unknown"),
        ("", "unknown"), ("Not", "no"), ("Ayes", "yes"), ("unknown", "unknown"), ("uno!", "no"),
    ],
)  # fmt: skip
def test_the_first_four_characters_decide(answer, read):
    assert PARSERS["mme"].read(answer, "yes") == read


def test_questions_and_cards(folder):
    mme = Mme(str(folder), "images", limit=1)
    assert isinstance(mme, Benchmark)
    questions = mme.ask()
    assert len(questions) == 28
    assert questions[0].id == "existence/0.jpg/1"
    assert questions[0].images == ("existence/0.jpg",)
    assert Mme(str(folder), "i", image="{image}").ask()[0].images == ("0.jpg",)
    cards = mme.protocol()
    assert cards.keys() == mme.score(right(mme)).keys()
    assert (cards["perception"]["n"], len(cards["perception"]["files"])) == (20, 10)


def test_comparison_is_by_image(folder):
    mme = Mme(str(folder), "images")
    worse = {**right(mme), "count/0.jpg/1": "no", "color/0.jpg/1": "no"}
    change = mme.compare(worse, right(mme))
    assert change["count"]["accuracy"]["difference"] == 1 / 8
    assert change["count"]["score"]["difference"] == 100 / 8 + 100 / 4
    assert change["hallucination"]["score"]["difference"] == 2 * (100 / 8 + 100 / 4)
    assert change["cognition"]["score"] == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0}


def test_official_answer_files_there_and_back(folder, tmp_path):
    mme = Mme(str(folder), "images")
    answers = {**right(mme), "OCR/0.jpg/1": "Yes,\tit\nis \\ so", "OCR/0.jpg/2": ""}
    mme.write_answers(answers, tmp_path / "answers")
    found = score_file(Mme(str(folder), ""), tmp_path / "answers")
    assert found.scores == mme.score(answers)
    assert found.empty == {"OCR": 1}


@pytest.mark.parametrize("text", ["", "a\tb", "a\nb\r\n", "\\n", "\\\\t\t", "ends with \\", "a\\nb\nc"])
def test_escaping_keeps_an_answer_on_one_line(text):
    assert unescape(escape(text)) == text
    assert not set(escape(text)) & set("\t\n\r")


def test_a_broken_answer_file_names_its_line(folder, tmp_path):
    mme = Mme(str(folder), "", tasks=["count"])
    mme.write_answers(right(mme), tmp_path)
    lines = (tmp_path / "count.txt").read_text().splitlines()
    for change, message in (
        ([*lines[:1], lines[1] + " it\nis", *lines[2:]], r"count\.txt:3: expected 4 columns.*found 1"),
        ([lines[1], lines[0], *lines[2:]], r"count\.txt:1: expected 0\.jpg"),
        (lines[:-1], "expected 8 lines, found 7"),
    ):
        (tmp_path / "count.txt").write_text("\n".join(change) + "\n")
        with pytest.raises(DataError, match=message):
            score_file(mme, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.jpg\tq\tYes\nb.jpg\tq\tNo\n", "expected the second question about 'a.jpg', found 'b.jpg'"),
        ("a.jpg\tq\tYes\na.jpg\tq\tYes\n", "expected one yes and one no about 'a.jpg', found yes twice"),
        ("a.jpg\tq\tperhaps\n", "count.txt:1: label 'perhaps' is neither yes nor no"),
        ("a.jpg\tq\tYes\n", "two lines per image, found 1"),
        ("a.jpg q Yes\n", "expected 3 columns with tabs between, found 1"),
        ("a\tq\tYes\na\tr\tNo\na\tq\tYes\na\tr\tNo\n", "'count/a/1' comes twice"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    (tmp_path / "count.txt").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Mme(str(tmp_path), "i").ask()
    assert "\n" not in str(caught.value)


def test_bad_options(tmp_path):
    with pytest.raises(DataError, match=r"task 'colour'.*nearest: color"):
        Mme(str(tmp_path), "i", tasks=["colour"])
    with pytest.raises(DataError, match="no task file"):
        Mme(str(tmp_path), "i").ask()
    with pytest.raises(DataError, match="found no folder"):
        Mme(str(tmp_path / "x"), "i").ask()
    with pytest.raises(DataError, match=r"no task file .*OCR"):
        Mme(str(tmp_path), "i", tasks=["OCR"]).ask()
    with pytest.raises(DataError, match=r"image: expected {image}"):
        Mme(str(tmp_path), "i", image="{task}")
