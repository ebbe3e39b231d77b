r"""STARE: extraction and equality case by case, images in the text, categories."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.numbers import number_in_latex, number_in_words
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks.stare import Stare, extract, is_equal
from vlm.data.errors import DataError

RECORDS = [
    {"qid": "a1", "question": "<image> then <image>?", "images": ["x.png", "y.png"], "answer": "C", "category": "2D"},
    {"qid": "a2", "question": "How many?", "images": [], "answer": "3", "category": "nets"},
    {"qid": "a3", "question": "Which?", "images": ["z.png"], "answer": "A", "category": "2D"},
]


@pytest.fixture
def build(tmp_path):
    def make(records=RECORDS, **options) -> Stare:
        path = tmp_path / "stare.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return Stare([str(path)], options.pop("images", "images"), **options)

    return make


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("A", "A"), (" h ", "H"), ("B: because", "B"), ("C. The third", "C"), ("I", ""), ("-3.5", "-3.5"),
        ("1e3", "1e3"), (r"so $\boxed{D}$", "D"), (r"\boxed{A} or rather \boxed{\text{B}}", "B"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{A", ""), ("The final answer is C.\nThanks", "c"), ("The answer is\n D. The net", "d"),
        ("Answer: B", "b"), ("the correct answer is x. But the answer should be y", "x"),
        ("A cube has six faces", ""), ("Because", ""), ("", ""),
    ],
)  # fmt: skip
def test_extraction_order(response, found):
    assert extract(response) == found


@pytest.mark.parametrize(
    ("found", "answer", "equal"),
    [
        ("c", "C", True), (" C ", "c", True), ("three", "3", True), ("Twenty-one", "21", True), ("3.0", "3", True),
        ("3.001", "3", True), ("3.01", "3", False), (r"\frac{3}{4}", "0.75", True), ("3/4", "0.75", True),
        (r"\sqrt{16}", "4", True), ("1,250", "1250", True), ("b", "c", False), ("", "A", False), ("50%", "0.5", True),
        (r"2\pi", "6.28", True), ("x+1", "1+x", False), ("$5$", "5", True),
    ],
)  # fmt: skip
def test_equality(found, answer, equal):
    assert is_equal(found, answer) is equal


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", -4), ("2(3+4)", 14), (r"\dfrac{1}{3} + \frac12", 1 / 3 + 0.5), (r"3 \times 10^2", 300),
        ("7 \\div 2", 3.5),
        (r"\left(1 + 2\right)^{2}", 9), ("1/0", None), ("2 +", None), (")", None), ("", None), ("3 apples", None),
        ("9^999", None), ("--1", 1),
    ],
)  # fmt: skip
def test_numbers_in_latex(text, value):
    assert number_in_latex(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [("seventeen", 17), ("one hundred and five", 105), ("two million three", 2_000_003), ("hundred", 100), ("a", None)],
)
def test_numbers_in_words(text, value):
    assert number_in_words(text) == value


def test_scores_by_hand(build):
    scores = build().score({"a1": "C.", "a2": "The answer is three.", "a3": "no idea"})
    assert {group: values["accuracy"] for group, values in scores.items()} == {"": 2 / 3, "2D": 1 / 2, "nets": 1.0}
    assert (scores[""]["unread"], scores["2D"]["n"]) == (1, 2)
    assert scores[""]["ci"][0] < 2 / 3 < scores[""]["ci"][1]


def test_questions_say_where_their_images_stand(build):
    stare = build()
    assert isinstance(stare, Benchmark)
    first, second, third = stare.ask()
    assert first.images == ("x.png", "y.png")
    assert first.parts()[:3] == (None, "then", None)
    assert second.images == () and second.parts() == (second.prompt,)
    assert third.parts() == (None, third.prompt)
    assert r"\boxed{}" in second.prompt and "only contains the final answer" in second.prompt
    assert build(strategy="cot").ask()[0].prompt.endswith("step by step.")


def test_cards_and_limit(build):
    stare = build(limit=1)
    assert [q.id for q in stare.ask()] == ["a1", "a2"]
    cards = build().protocol()
    assert [(group, card["n"]) for group, card in cards.items()] == [("", 3), ("2D", 2), ("nets", 1)]
    assert (cards[""]["judge"], cards[""]["strategy"]) == ("extracted", "direct")


def test_comparison_and_judge(build, tmp_path):
    before, after = {"a1": "A", "a2": "3", "a3": "A"}, {"a1": "C", "a2": "3", "a3": "A"}
    change = build().compare(before, after)
    assert change[""]["accuracy"]["difference"] == pytest.approx(1 / 3)
    assert change["nets"]["accuracy"]["difference"] == 0
    path = tmp_path / "replies.jsonl"
    lines = [{"id": k, "reply": r} for k, r in (("a1", "Correct."), ("a2", "Incorrect"), ("a3", "hm"))]
    path.write_text("\n".join(map(json.dumps, lines)))
    scores = build(judge=str(path)).score(after)[""]
    assert (scores["accuracy"], scores["unread"]) == (1 / 3, 1)


def test_the_official_result_file(build, tmp_path):
    path = tmp_path / "result.json"
    said = {"a1": "C", "a2": "4", "a3": ""}
    path.write_text(json.dumps({r["qid"]: {**r, "query": "q", "response": said[r["qid"]]} for r in RECORDS}))
    found = score_file(build(images=""), path)
    assert (found.scores[""]["accuracy"], found.empty) == (1 / 3, {"2D": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["x.png"]}, "expected 1 marks <image> in the question, found 2"),
        ({"images": "x.png"}, "images: expected a list of names of files"),
        ({"qid": "a2"}, "'a2' comes twice"),
        ({"qid": None}, "lacks qid or pid"),
    ],
)
def test_bad_files_are_one_line(build, change, message):
    with pytest.raises(DataError, match=message) as caught:
        build([{**RECORDS[0], **change}, *RECORDS[1:]]).ask()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"strategy 'drect'.*nearest: direct"):
        build(strategy="drect")
