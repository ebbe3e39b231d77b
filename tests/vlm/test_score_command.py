"""`vlm data score`: numbers of a file of answers on the command line, changes, judges, mistakes in one line."""

import json
from pathlib import Path

import pytest

from vlm.commands import main


@pytest.fixture(autouse=True)
def in_a_folder_with_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question_id": k, "image": f"{k}.jpg", "text": f"Is there a {k}?", "label": "yes"} for k in range(1, 5)]
    Path("pope_random.json").write_text("\n".join(map(json.dumps, rows)))
    for name, answers in (("good.jsonl", ["yes"] * 4), ("bad.jsonl", ["yes", "no", "no", ""])):
        lines = [{"question_id": k, "answer": answer} for k, answer in enumerate(answers, start=1)]
        Path(name).write_text("\n".join(map(json.dumps, lines)))


POPE = ("questions=[pope_random.json]",)


def test_a_file_is_scored_without_model_and_images(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "score", "pope", "bad.jsonl", *POPE, "--out", "score.json"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    # an empty answer is a yes to the official parser
    assert first.startswith("pope random: accuracy 0.5000 (95 %: 0.1500 to 0.8500), precision 1.0000, recall 0.5000")
    assert rest == ["1 of 4 answers are empty"]
    written = json.loads(Path("score.json").read_text())
    assert written["scores"]["random"]["accuracy"] == 0.5
    assert written["protocol"]["random"]["files"][0]["name"] == "pope_random.json"


def test_two_files_are_compared_question_by_question(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "score", "pope", "good.jsonl", *POPE, "--baseline", "bad.jsonl"]) == 0
    assert "pope random: accuracy changes by +0.5000 (95 %: +0.0000 to +1.0000, p 0.5)" in capsys.readouterr().out


def test_missing_images_are_counted(capsys: pytest.CaptureFixture[str]):
    Path("images").mkdir()
    Path("images/2.jpg").write_bytes(b"")
    assert main(["data", "score", "pope", "good.jsonl", *POPE, "images=images"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 images are missing: 1.jpg, 3.jpg, 4.jpg"


def test_requests_for_a_judge_are_written(capsys: pytest.CaptureFixture[str]):
    Path("q.csv").write_text("Index,Question,Options,Correct Answer\n1,Q?,(a) x (b) y,(a)\n2,Q?,(a) x (b) y,(b)\n")
    Path("a.json").write_text('{"1": "x", "2": "the second"}')
    assert main(["data", "score", "mmvp", "a.json", "questions=q.csv", "--requests", "ask.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("ask.jsonl: 2 requests")
    asked = [json.loads(line) for line in Path("ask.jsonl").read_text().splitlines()]
    assert [one["id"] for one in asked] == ["1", "2"]
    Path("replies.jsonl").write_text("\n".join(json.dumps({"id": one["id"], "reply": "yes"}) for one in asked))
    assert main(["data", "score", "mmvp", "a.json", "questions=q.csv", "judge=replies.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("mmvp: pair_accuracy 1.0000")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("pope", "nowhere.json", *POPE), "pope: no file of answers 'nowhere.json'"),
        (("poep", "good.jsonl"), "benchmark poep is unknown; did you mean 'pope'?"),
        (("pope", "good.jsonl"), "use pope needs the option 'questions'"),
        (("pope", "good.jsonl", *POPE, "parsr=pai"), "override parsr=pai: parsr is unknown; did you mean 'parser'?"),
        (("pope", "good.jsonl", *POPE, "--requests", "x"), "--requests: pope has no judge"),
        (("pope", "good.jsonl", *POPE, "images=nowhere"), "images: expected a folder of images or of shards"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "score", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}") and error.count("\n") == 1
