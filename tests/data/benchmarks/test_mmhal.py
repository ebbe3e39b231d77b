"""MMHal-Bench: ratings and rates by hand, saved replies, the rule judge and its label."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks.mmhal import TYPES, Mmhal, read_rating
from vlm.data.errors import DataError


def record(number: int, **change):
    return {
        "question_type": TYPES[number % 8],
        "question_topic": "outdoor",
        "image_id": f"id{number}",
        "image_src": f"https://images.example/1/{number}_o.jpg",
        "image_content": ["Dog", "Bench"],
        "question": f"What is it, {number}?",
        "gt_answer": "A brown dog lies on the bench.",
        "model_answer": "",
        **change,
    }


@pytest.fixture
def build(tmp_path):
    def make(records=None, **options) -> Mmhal:
        path = tmp_path / "template.json"
        path.write_text(json.dumps(records or [record(k) for k in range(16)]))
        return Mmhal(str(path), options.pop("images", "images"), **options)

    return make


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 3", 3), ("...so\nrating: 0", 0), ("RATING: 6, very informative", 6),
        ("Rating: 2. Not rating: 5", None), ("Rating 4", None), ("", None), ("Rating: 7", None),
        ("rating: 1 ... rating: 1", 1),
    ],
)  # fmt: skip
def test_golden_ratings(reply, rating):
    assert read_rating(reply) == rating


def test_saved_replies_by_hand(build, tmp_path):
    ratings = [6, 5, 4, 3, 2, 1, 0, None] * 2
    path = tmp_path / "replies.jsonl"
    lines = [{"id": str(k), "reply": f"Rating: {r}"} for k, r in enumerate(ratings)]
    path.write_text("\n".join(map(json.dumps, lines)))
    mmhal = build(judge=str(path))
    scores = mmhal.score({str(k): "x" for k in range(16)})
    whole = scores[""]
    assert whole["mean_rating"] == pytest.approx((6 + 5 + 4 + 3 + 2 + 1) / 8)
    assert whole["hallucination_rate"] == 4 / 8  # below 3, the unread ones too
    assert whole["informativeness"] == pytest.approx((3 + 2 + 1 + 0 + 2 + 1 + 0 + 0) / 8 / 3)
    assert (whole["unread"], whole["n"]) == (2, 16)
    assert whole["ci"][0] < whole["mean_rating"] < whole["ci"][1]
    assert [scores[kind]["mean_rating"] for kind in TYPES] == [6, 5, 4, 3, 2, 1, 0, 0]
    assert scores.keys() == mmhal.protocol().keys()
    assert mmhal.protocol()[""]["judge"] == str(path)


def test_the_rule_orders_obvious_answers_and_says_what_it_is(build):
    mmhal = build([record(0)])
    texts = [
        "A brown dog lies on the bench.",  # all of it
        "A dog on a bench.",
        "I do not know.",
        "A brown dog lies on the bench beside a car.",  # all of it, and a car
        "A car.",
    ]
    ratings = [mmhal.score({"0": text})[""]["mean_rating"] for text in texts]
    assert ratings == sorted(ratings, reverse=True)
    assert (ratings[0], ratings[2], ratings[4]) == (6, 3, 0)
    assert all(rating < 3 for rating in ratings[3:])
    assert "no MMHal number" in mmhal.protocol()[""]["judge"]


def test_questions(build):
    mmhal = build(limit=3)
    assert isinstance(mmhal, Benchmark)
    questions = mmhal.ask()
    assert [(q.id, q.group) for q in questions] == [("0", "attribute"), ("1", "adversarial"), ("2", "comparison")]
    assert questions[1].images == ("1_o.jpg",)
    assert build(image_key="image_id").ask()[1].images == ("id1",)


def test_requests_hold_all_a_judge_needs(build):
    [request, *_] = build().judge_requests({str(k): f"answer {k}" for k in range(16)})
    for part in ("Dog, Bench", "What is it, 0?", "A brown dog lies on the bench.", "answer 0", "Rating: k"):
        assert part in request.prompt


def test_comparison(build):
    good, bad = ({str(k): text for k in range(16)} for text in ("A brown dog lies on the bench.", "A car."))
    change = build().compare(bad, good)[""]
    assert change["mean_rating"]["difference"] == 6
    assert change["hallucination_rate"]["difference"] == -1
    assert change["hallucination_rate"]["p"] < 1e-4


def test_the_official_answer_file(build, tmp_path):
    path = tmp_path / "response.json"
    path.write_text(json.dumps([record(k, model_answer="A brown dog lies on the bench.") for k in range(16)]))
    assert score_file(build(images=""), path).scores[""]["mean_rating"] == 6


def test_bad_files_are_one_line(build):
    with pytest.raises(DataError, match=r"question 2: expected the type 'adversarial' in the official order"):
        build([record(0), record(2)]).ask()
    with pytest.raises(DataError, match=r"question 1 lacks gt_answer"):
        build([{key: value for key, value in record(0).items() if key != "gt_answer"}]).ask()
    with pytest.raises(DataError, match=r"judge 'rul'.*nearest: rule"):
        build(judge="rul")
