"""MMVP: pairs, the two label sets, string-match, and a judge."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.judge import write_requests
from vlm.data.benchmarks._shared.plugins import PLUGINS
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks.mmvp import Mmvp, read_option
from vlm.data.errors import DataError


@pytest.fixture
def build(tmp_path):
    def make(rows=6, text=None, **options) -> Mmvp:
        lines = ["Index,Question,Options,Correct Answer"]
        lines += [f'{n},"Is it open, or not?",(a) Open (b) Closed,({"ab"[n % 2]})' for n in range(1, rows + 1)]
        path = tmp_path / "Questions.csv"
        path.write_text(text if text is not None else "\n".join(lines) + "\n")
        return Mmvp(str(path), "images", **options)

    return make


def right(rows: int) -> dict[str, str]:
    return {str(n): f"({'ab'[n % 2]})" for n in range(1, rows + 1)}


def test_a_pair_counts_only_whole(build):
    mmvp = build()
    assert mmvp.score(right(6))[""]["pair_accuracy"] == 1.0
    scores = mmvp.score({**right(6), "1": "(a)", "4": "Open or closed"})[""]
    assert (scores["pair_accuracy"], scores["answer_accuracy"], scores["n"], scores["unknown"]) == (1 / 3, 4 / 6, 3, 1)
    assert scores["ci"][0] < 1 / 3 < scores["ci"][1]
    # one letter for all is half of the answers and no pair
    assert mmvp.score(dict.fromkeys(right(6), "(a)"))[""]["pair_accuracy"] == 0.0


def test_labels_are_official_unless_fixed(build):
    official, fixed = build(300), build(300, fix_labels=True)
    assert official.score(right(300))[""]["pair_accuracy"] == 1.0
    assert fixed.score(right(300))[""]["pair_accuracy"] == 148 / 150
    swapped = right(300)
    for first, second in (("99", "100"), ("279", "280")):
        swapped[first], swapped[second] = swapped[second], swapped[first]
    assert fixed.score(swapped)[""]["pair_accuracy"] == 1.0
    assert official.protocol()[""]["labels"] == "official"
    assert "99/100" in fixed.protocol()[""]["labels"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(b)", "b"), ("(a) Open", "a"), ("B.", "b"), ("b", "b"), ("A: open", "a"), ("**(b)**", "b"),
        ("The answer is (b).", "b"), ("Answer: a", "a"), ("I would say (a) here", "a"),
        ("The door is closed.", "b"), ("It's open!", "a"),
        ("Open and closed", None), ("either (a) or (b)", None), ("", None), ("A butterfly", None), ("Yes", None),
    ],
)  # fmt: skip
def test_string_match(answer, letter):
    assert read_option(answer, {"a": "Open", "b": "Closed"}) == letter


def test_an_option_inside_the_other_is_not_chosen_with_it():
    assert read_option("on the left of it", {"a": "left", "b": "on the left of it"}) == "b"
    assert read_option("it is on the left", {"a": "left", "b": "on the left of it"}) == "a"


def test_questions_and_card(build):
    mmvp = build(limit=2)
    assert isinstance(mmvp, Benchmark)
    questions = mmvp.ask()
    assert [q.id for q in questions] == ["1", "2", "3", "4"]
    assert (questions[0].images, questions[0].prompt) == (("1",), "Is it open, or not? (a) Open (b) Closed")
    card = mmvp.protocol()[""]
    assert (card["judge"], card["n"]) == ("string-match", 2)


def test_a_judge_decides(build, tmp_path, monkeypatch):
    answers = right(4)
    saved = tmp_path / "replies.jsonl"
    requests = build(4).judge_requests(answers)
    assert "Right answer: (b)\nGiven answer: (b)" in requests[0].prompt
    write_requests(requests, tmp_path / "requests.jsonl")
    asked = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    replies = ["Yes", "yes.", "no", "perhaps"]
    saved.write_text("\n".join(json.dumps({"id": a["id"], "reply": r}) for a, r in zip(asked, replies, strict=True)))
    scores = build(4, judge=str(saved)).score(answers)[""]
    assert (scores["pair_accuracy"], scores["answer_accuracy"], scores["unknown"]) == (0.5, 0.5, 1)
    monkeypatch.setitem(PLUGINS["judge"], "kind", lambda requests: ["yes"] * len(requests))
    assert build(4, judge="kind").score(answers)[""]["pair_accuracy"] == 1.0
    monkeypatch.setitem(PLUGINS["judge"], "lazy", lambda requests: ["yes"])
    with pytest.raises(DataError, match="judge: expected 4 replies, found 1"):
        build(4, judge="lazy").score(answers)
    saved.write_text('{"id": "1", "reply": "yes"}\n')
    with pytest.raises(DataError, match="3 of 4 requests have no reply, the first is '2'"):
        build(4, judge=str(saved)).score(answers)
    with pytest.raises(DataError, match=r"judge 'string_match'.*nearest: string-match"):
        build(4, judge="string_match")


def test_comparison_is_by_pair(build):
    change = build().compare({**right(6), "1": "x", "3": "x"}, right(6))[""]["pair_accuracy"]
    assert change["difference"] == pytest.approx(2 / 3)
    assert change["p"] == 0.5


def test_the_official_answer_file(build, tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [{"question_id": int(k), "prompt": "q", "answer": "(a)", "response": v} for k, v in right(6).items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert score_file(Mmvp(build().questions, ""), path).scores[""]["pair_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column Index"),
        ("Index,Question,Options\n", "lacks the column Correct Answer"),
        ("Index,Question,Options,Correct Answer\n", "no questions"),
        ("Index,Question,Options,Correct Answer\n2,q,(a) x (b) y,(a)\n", "expected Index 1, found '2'"),
        ("Index,Question,Options,Correct Answer\n1,q,x or y,(a)\n", "Options: expected"),
        ("Index,Question,Options,Correct Answer\n1,q,(a) x (b) y,(c)\n", "Correct Answer: expected"),
        ("Index,Question,Options,Correct Answer\n1,q,(a) x (b) y,(a)\n", "expected pairs of rows, found 1"),
        ("Index,Question,Options,Correct Answer\n1,q,r,s,t\n", "expected 4 fields as in the header"),
    ],
)
def test_bad_files_are_one_line(build, text, message):
    with pytest.raises(DataError, match=message) as caught:
        build(text=text).ask()
    assert "\n" not in str(caught.value)
