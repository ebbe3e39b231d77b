"""Top-1 and top-5 by hand, with one label to a picture and with several."""

import json

import pytest

from vlm.data.benchmarks._shared.statistics import wilson
from vlm.data.benchmarks.classification import Classification
from vlm.data.errors import DataError

TRUTH = {"a": "cup", "b": ["cup", "stop sign"], "c": ["fork"], "d": "plate"}
ANSWERS = {
    "a": "cup\nfork\nplate",
    "b": "Stop  Sign\nfork",  # any of its classes, whatever the case
    "c": "cup\nplate\nknife\nspoon\nfork\ncup",  # the fifth
    "d": "cup\nfork\nknife\nspoon\nbowl\nplate",  # the sixth
}


def opened(tmp_path, truth=TRUTH, **options):
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return Classification(truth=str(tmp_path / "truth.json"), images=str(tmp_path), **options)


def test_scores_by_hand(tmp_path):
    benchmark = opened(tmp_path)
    assert [(q.id, q.images, q.prompt) for q in benchmark.ask()] == [(key, (key,), "") for key in TRUTH]
    scores = benchmark.score(ANSWERS)[""]
    assert (scores["top1"], scores["top5"], scores["n"]) == (0.5, 0.75, 4)
    assert scores["ci"] == list(wilson(2, 4)) and scores["ci_5"] == list(wilson(3, 4))
    card = benchmark.protocol()[""]
    assert card["labels"].startswith("1 of 4 pictures") and card["n"] == 4 and card["files"][0]["name"] == "truth.json"


def test_a_change_is_paired(tmp_path):
    benchmark = opened(tmp_path)
    change = benchmark.compare(ANSWERS, ANSWERS | {"a": "fork", "c": "fork", "d": "plate"})[""]["top1"]
    assert change["difference"] == 0.25 and change["p"] == 1.0  # one lost, two won


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [
        ({"a": 3}, "image 'a': expected a class or a list of classes, found 3"),
        ({"a": []}, "image 'a': expected a class or a list of classes, found \\[\\]"),
        ([], "expected an object of images and their classes"),
    ],
)
def test_bad_truth_is_one_line(tmp_path, truth, complaint):
    with pytest.raises(DataError, match=complaint):
        opened(tmp_path, truth).ask()


def test_a_score_needs_every_answer(tmp_path):
    with pytest.raises(DataError, match="1 of 2 questions have no answer, the first is 'b'"):
        opened(tmp_path, limit=2).score({"a": "cup"})
