"""HallusionBench: groups by hand, the whole table of diagnoses, string-match, a judge's replies."""

import itertools
import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks.hallusionbench import RIGHT, UNCLEAR, WRONG, Hallusionbench, diagnose
from vlm.data.errors import DataError


def row(category, visual, figure, question, answer, set_id="0", sub=None):
    return {
        "category": category,
        "subcategory": sub or ("illusion" if category == "VD" else "chart"),
        "visual_input": visual,
        "set_id": set_id,
        "figure_id": figure,
        "question_id": question,
        "question": f"Question {question} of set {set_id}?",
        "gt_answer": answer,
        "gt_answer_details": f"It is {answer}.",
        "filename": None if visual == "0" else f"./{category}/x/{set_id}_{figure}.png",
    }


# two questions about an original (figure 0) and an edited image; one asked blind, of the original and an edited one
ROWS = [
    row("VD", "1", "0", "0", "1"),
    row("VD", "1", "0", "1", "0"),
    row("VD", "2", "1", "0", "0"),
    row("VD", "2", "1", "1", "0"),
    row("VS", "0", "0", "0", "1"),
    row("VS", "1", "1", "0", "1"),
    row("VS", "2", "2", "0", "0"),
]
IDS = [
    "VD/illusion/0/0/0", "VD/illusion/0/0/1", "VD/illusion/0/1/0", "VD/illusion/0/1/1",
    "VS/chart/0/0/0", "VS/chart/0/1/0", "VS/chart/0/2/0",
]  # fmt: skip


@pytest.fixture
def build(tmp_path):
    def make(rows=None, **options) -> Hallusionbench:
        path = tmp_path / "HallusionBench.json"
        path.write_text(json.dumps(ROWS if rows is None else rows))
        return Hallusionbench(str(path), options.pop("images", "images"), **options)

    return make


def answered(*texts: str) -> dict[str, str]:
    return dict(zip(IDS, texts, strict=True))


def test_all_right(build):
    scores = build().score(answered("Yes", "No", "No", "No", "Yes", "Yes", "No"))
    for values in scores.values():
        names = ("accuracy", "question_accuracy", "figure_accuracy", "easy_accuracy", "hard_accuracy")
        assert [values[name] for name in names] == [1.0] * 5
        assert (values["yes_bias"], values["language_hallucination"], values["mixed"]) == (0.0, 0.0, 0.0)


def test_groups_by_hand(build):
    # VD: question 0 right on the original, wrong with the same answer on the edited one; question 1 right on both
    # VS: blind unclear (which is right), original right, edited wrong
    scores = build().score(answered("Yes", "No", "Yes", "No", "I cannot tell", "Yes", "Yes"))
    whole = scores[""]
    assert whole["accuracy"] == 5 / 7
    assert whole["question_accuracy"] == 1 / 3  # only question 1 of VD
    assert whole["figure_accuracy"] == 2 / 4  # originals of VD and VS; blind is no figure
    assert whole["easy_accuracy"] == 3 / 3
    assert whole["hard_accuracy"] == 1 / 3
    # wrong: edited VD with the original's answer (mixed), edited VS after an unclear blind answer (VI)
    assert (whole["language_hallucination"], whole["visual_illusion"], whole["mixed"]) == (0, 0.5, 0.5)
    assert whole["yes_bias"] == pytest.approx(5 / 7 - 3 / 7)  # said yes: 0, 2, blind counts as right hence yes, 5, 6
    assert whole["false_positives"] == 1.0
    assert (whole["n"], whole["unknown"]) == (7, 1)
    assert (scores["VD"]["accuracy"], scores["VS"]["accuracy"]) == (3 / 4, 2 / 3)
    assert scores["VS"]["figure_accuracy"] == 1 / 2


def expected_cause(category, visual, is_original, original, code, same):
    """The paper's decision tree, written as a table of its leaves."""
    if code == RIGHT:
        return None
    if category == "VD":
        leaves = {("original", None): "VI", (RIGHT, WRONG): "Mixed" if same else "VI"}
        return leaves["original", None] if is_original else leaves.get((original, code), "VI")
    if is_original:
        return {WRONG: "LH", UNCLEAR: None}[code]
    return {
        (WRONG, WRONG): "LH" if same else "Mixed",
        (WRONG, UNCLEAR): "Mixed",
        (UNCLEAR, WRONG): "VI",
        (UNCLEAR, UNCLEAR): "VI",
        (RIGHT, UNCLEAR): "VI",
        (RIGHT, WRONG): "LH" if visual == "2" and same else "VI",
    }[original, code]


@pytest.mark.parametrize("category", ["VD", "VS"])
def test_every_leaf_of_the_diagnosis(category):
    for is_original, original, code, same in itertools.product(
        (True, False), (WRONG, RIGHT, UNCLEAR), (WRONG, RIGHT, UNCLEAR), (True, False)
    ):
        for visual in ("1", "2"):
            case = (category, visual, is_original, original, code, same)
            assert diagnose(*case) == expected_cause(*case), case


def test_blind_guesses_are_language(build):
    scores = build().score(answered("Yes", "No", "No", "No", "No", "No", "No"))["VS"]
    # blind wrong: LH; original wrong with the same answer: LH; the edited image is answered right
    assert (scores["language_hallucination"], scores["accuracy"], scores["false_positives"]) == (1.0, 1 / 3, 0.0)


def test_unclear_counts_as_right_only_when_blind(build):
    scores = build().score(answered(*["perhaps"] * 7))
    assert scores[""]["accuracy"] == 1 / 7
    assert scores["VS"]["question_accuracy"] == 0.0


def test_questions_have_an_image_or_none(build):
    bench = build(prompt="{} Answer yes or no.")
    assert isinstance(bench, Benchmark)
    questions = bench.ask()
    assert [q.id for q in questions] == IDS
    assert questions[4].images == ()
    assert (questions[0].images, questions[0].group) == (("VD/x/0_0.png",), "VD")
    assert questions[0].prompt == "Question 0 of set 0? Answer yes or no."


def test_cards_name_the_mode(build):
    cards = build().protocol()
    assert [(group, card["n"]) for group, card in cards.items()] == [("", 7), ("VD", 4), ("VS", 3)]
    assert (cards[""]["judge"], cards[""]["parser"]) == ("string-match", "vlmeval")
    assert "parser" not in build(judge="replies.jsonl").protocol()[""]


def test_limit_keeps_sets_whole(build):
    more = [*ROWS, row("VD", "1", "0", "0", "1", set_id="1"), row("VD", "2", "1", "0", "1", set_id="1")]
    assert len(build(more, limit=1).ask()) == 4
    assert len(build(more, limit=3).ask()) == 9


def test_a_judge_reads_answers_in_words(build, tmp_path):
    path = tmp_path / "replies.jsonl"
    answers = answered("They are equal", "b", "c", "d", "e", "f", "g")
    requests = build().judge_requests(answers)
    assert len(requests) == 14
    assert "Reference: It is 1." in requests[0].prompt and "They are equal" in requests[0].prompt
    # the edited image's answer is compared with the original's
    same = next(r.prompt for r in requests if r.id == "VD/illusion/0/1/0#same")
    assert same.startswith("First answer: c\nSecond answer: They are equal\n")
    replies = ["Correct.", "correct", "Incorrect", "unclear", "Unclear", "INCORRECT", "correct"]
    agreement = ["same"] * 3 + ["different", "same", "Different", "same"]
    lines = [{"id": r.id, "reply": reply} for r, reply in zip(requests, replies + agreement, strict=True)]
    path.write_text("\n".join(map(json.dumps, lines)))
    scores = build(judge=str(path)).score(answers)
    assert scores[""]["accuracy"] == 4 / 7  # 0, 1, blind unclear, edited VS
    # VD edited wrong and the same as the right original: mixed; VD edited unclear: VI; VS wrong after unclear: VI
    assert (scores[""]["mixed"], scores[""]["visual_illusion"]) == (1 / 3, 2 / 3)


def test_comparison(build):
    before = answered("No", "No", "No", "No", "Yes", "Yes", "No")
    after = answered("Yes", "No", "No", "No", "Yes", "Yes", "No")
    change = build().compare(before, after)[""]
    assert change["accuracy"]["difference"] == pytest.approx(1 / 7)
    assert change["question_accuracy"]["difference"] == pytest.approx(1 / 3)
    assert change["figure_accuracy"]["difference"] == 1 / 4


def test_the_official_answer_file(build, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps([{**r, "model_prediction": "Yes"} for r in ROWS]))
    found = score_file(build(images=""), path)
    assert found.scores[""]["accuracy"] == 3 / 7
    path.write_text(json.dumps([{**r, "model_prediction": ""} for r in ROWS]))
    assert score_file(build(images=""), path).empty == {"VD": 4, "VS": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_answer": "2"}, "gt_answer '2' is none of 0, 1"),
        ({"category": "VX"}, "category 'VX' is none of VD, VS"),
        ({"filename": None}, "expected a filename exactly where visual_input is not 0"),
        ({"figure_id": "7"}, "its question is not asked of figure 0"),
        ({"figure_id": "1"}, "comes twice"),
    ],
)
def test_bad_files_are_one_line(build, change, message):
    with pytest.raises(DataError, match=message) as caught:
        build([{**ROWS[0], **change}, *ROWS[1:]]).ask()
    assert "\n" not in str(caught.value)


def test_a_missing_key(build):
    with pytest.raises(DataError, match="question 1 lacks gt_answer_details"):
        build([{key: value for key, value in ROWS[0].items() if key != "gt_answer_details"}]).ask()
