"""POPE on files: the three official forms, groups, scores, cards and what a user gets wrong."""

import hashlib
import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.pope_builder import SPLITS, Labelled, build_pope
from vlm.data.benchmarks.pope import Pope, recall_spread
from vlm.data.errors import DataError

IMAGES = [Labelled(f"{k}.jpg", tuple(f"{c}{(k + j) % 6}" for j, c in enumerate("bdf"))) for k in range(12)]


@pytest.fixture
def files(tmp_path):
    paths = []
    for split in SPLITS:
        path = tmp_path / f"coco_pope_{split}.json"
        path.write_text("".join(json.dumps(r) + "\n" for r in build_pope(IMAGES, split)))
        paths.append(str(path))
    return paths


def test_questions_come_in_file_order(files):
    pope = Pope(files, "images")
    assert isinstance(pope, Benchmark)
    questions = pope.ask()
    assert len(questions) == 3 * 72
    assert [q.group for q in questions[::72]] == ["random", "popular", "adversarial"]
    assert questions[0].id == "random/1"
    assert (questions[0].image, questions[0].prompt) == ("0.jpg", "Is there a b0 in the image?")
    assert len({q.id for q in questions}) == len(questions)


def test_arrays_and_joined_files_give_the_same_questions(files, tmp_path):
    records = [[json.loads(line) for line in open(path)] for path in files]  # noqa: SIM115, PTH123
    array = tmp_path / "seem_pope_random.json"
    array.write_text(json.dumps(records[0]))
    assert Pope([str(array)], "i").ask() == Pope(files[:1], "i").ask()
    joined = tmp_path / "llava_pope_test.jsonl"
    lines = [{**r, "category": split} for split, rows in zip(SPLITS, records, strict=True) for r in rows]
    joined.write_text("\n".join(json.dumps(line) for line in lines))
    assert Pope([str(joined)], "i").ask() == Pope(files, "i").ask()


def test_prompt_and_limit(files):
    questions = Pope(files, "i", prompt="{} Please answer this question with one word.", limit=4).ask()
    assert len(questions) == 12
    assert questions[0].prompt == "Is there a b0 in the image? Please answer this question with one word."


def truth(files) -> dict[str, str]:
    """Question id -> right answer."""
    rows = [(split, json.loads(line)) for split, path in zip(SPLITS, files, strict=True) for line in open(path)]  # noqa: SIM115, PTH123
    return {f"{split}/{row['question_id']}": row["label"] for split, row in rows}


def test_right_answers_score_one(files):
    scores = Pope(files, "i").score(truth(files))
    assert list(scores) == list(SPLITS)
    for values in scores.values():
        assert [values[k] for k in ("accuracy", "precision", "recall", "f1")] == [1.0] * 4
        assert (values["yes_ratio"], values["n"], values["warnings"]) == (0.5, 72, [])


def test_always_yes_scores_half(files):
    values = Pope(files, "i").score(dict.fromkeys(truth(files), "Yes"))["random"]
    assert (values["accuracy"], values["recall"], values["precision"], values["yes_ratio"]) == (0.5, 1.0, 0.5, 1.0)


def test_a_deterministic_answerer_has_one_recall(files):
    pope = Pope(files, "i")
    # knows only the question and the image, as a greedy model does
    answers = {
        q.id: "no" if hashlib.sha256(f"{q.image}{q.prompt}".encode()).digest()[0] < 90 else "yes" for q in pope.ask()
    }
    scores = pope.score(answers)
    assert 0 < scores["random"]["recall"] < 1
    assert recall_spread(scores) == 0
    assert not any(values["warnings"] for values in scores.values())
    answers[next(key for key, label in truth(files).items() if label == "yes" and answers[key] == "yes")] = "no"
    unsteady = pope.score(answers)
    assert recall_spread(unsteady) == pytest.approx(1 / 36)
    assert all("not deterministic" in values["warnings"][0] for values in unsteady.values())


def test_parser_is_the_one_asked_for(files):
    answers = dict.fromkeys(truth(files), "There isn't one")
    assert Pope(files, "i").score(answers)["random"]["yes_ratio"] == 1.0
    assert Pope(files, "i", parser="pai").score(answers)["random"]["yes_ratio"] == 0.0
    lmms = Pope(files, "i", parser="lmms").score(answers)["random"]
    assert (lmms["accuracy"], lmms["unknown"]) == (0.0, 72)


def test_comparison_counts_question_by_question(files):
    pope, right = Pope(files[:1], "i"), truth(files)
    worse = {**right, "random/1": "no", "random/3": "no", "random/5": "no"}
    change = pope.compare(worse, right)["random"]["accuracy"]
    assert change["difference"] == pytest.approx(3 / 72)
    # three disagreements, all one way: 2 * (1/2)^3
    assert change["p"] == pytest.approx(0.25)


def test_card_holds_what_the_number_depends_on(files):
    card = Pope(files, "i", parser="vcd", limit=10).protocol()["popular"]
    assert (card["parser"], card["prompt"], card["max_new_tokens"], card["n"]) == ("vcd", "{}", 8, 10)
    with open(files[1], "rb") as file:  # noqa: PTH123
        assert card["files"][1] == {
            "name": "coco_pope_popular.json",
            "sha256": hashlib.sha256(file.read()).hexdigest(),
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "file.json"}, "expected a list"),
        ({"questions": []}, "expected a list"),
        ({"prompt": "answer"}, "expected one {}"),
        ({"parser": "offical"}, "nearest: official"),
        ({"limit": 0}, "limit"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(DataError, match=message) as caught:
        Pope(**{"questions": ["a"], "images": "b", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "neither JSON lines nor a JSON array"),
        ('{"question_id": 1, "image": "a", "text": "b"}', "question 1 lacks label"),
        ('{"question_id": 1, "image": "a", "text": "b", "label": "maybe"}', "neither yes nor no"),
        ('{"question_id": 1, "image": "a", "text": "b", "label": "no"}\n' * 2, "question_id twice"),
        ("[1]", "expected an object"),
        ("", "no questions"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "pope_random.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Pope([str(path)], "i").ask()
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_answer(files):
    with pytest.raises(DataError, match=r"no question file 'nowhere\.json'"):
        Pope(["nowhere.json"], "i").ask()
    with pytest.raises(DataError, match=r"72 of 72 questions have no answer, the first is .random/1"):
        Pope(files, "i").score({})
