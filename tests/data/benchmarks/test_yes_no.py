"""Every parser on a table, and the metrics on counts worked out by hand."""

import pytest

from vlm.data.benchmarks._shared.yes_no import PARSERS, parser_named, yes_no_metrics
from vlm.data.errors import DataError

GOLDEN = [
    ("Yes, there is a dog.", "yes"),
    ("No", "no"),
    ("no, not visible", "no"),
    ("NO", "yes"),
    ("", "yes"),
    ("I do not think so. Yes", "no"),
    ("There is no. yes", "no"),
    ("no.", "no"),
    ("There isn't one", "yes"),
    ("I cannot see", "yes"),
    ("It is\nnot", "yes"),
]


@pytest.mark.parametrize(("answer", "expected"), GOLDEN)
@pytest.mark.parametrize("label", ["yes", "no"])
def test_official_parser_on_the_golden_answers(answer, expected, label):
    assert PARSERS["official"].read(answer, label) == expected


TABLE = [
    # answer, label, vcd, pai, lmms, vlmeval
    ("Yes", "yes", "yes", "yes", "yes", "yes"),
    (" no \n", "no", "no", "no", "no", "no"),
    ("NO", "no", "no", "no", "no", "no"),
    ("No.", "yes", "no", "no", "unknown", "no"),
    ("There isn't one", "no", "yes", "no", "unknown", "unknown"),
    ("I don't know", "no", "no", "no", "unknown", "unknown"),
    ("I know it", "no", "no", "yes", "unknown", "unknown"),
    ("I know it", "yes", "no", "yes", "unknown", "unknown"),
    ("yes and no", "no", "no", "no", "unknown", "unknown"),
    ("yes and no", "yes", "yes", "no", "unknown", "unknown"),
    ("Yes. Not sure", "yes", "yes", "yes", "unknown", "yes"),
    ("yes! it is", "yes", "yes", "yes", "unknown", "yes"),
    ("yes,it is", "yes", "yes", "yes", "unknown", "yes"),
    ("", "no", "yes", "yes", "unknown", "unknown"),
]


@pytest.mark.parametrize(("answer", "label", "vcd", "pai", "lmms", "vlmeval"), TABLE)
def test_other_parsers_on_a_table(answer, label, vcd, pai, lmms, vlmeval):
    found = [PARSERS[name].read(answer, label) for name in ("vcd", "pai", "lmms", "vlmeval")]
    assert found == [vcd, pai, lmms, vlmeval]


@pytest.mark.parametrize(
    ("answer", "exact", "first_word"),
    [
        ("Yes", "yes", "yes"), ("No", "no", "no"), ("yes", "unknown", "yes"), ("No.", "unknown", "no"),
        ("**No**, it is", "unknown", "no"), ("Not so", "unknown", "unknown"), ("", "unknown", "unknown"),
        ("There is no dog", "unknown", "unknown"),
    ],
)  # fmt: skip
def test_parsers_of_other_benchmarks(answer, exact, first_word):
    assert [PARSERS[name].read(answer, "yes") for name in ("exact", "first_word")] == [exact, first_word]


def test_a_parser_by_name():
    assert parser_named("pai", "toy") is PARSERS["pai"]
    with pytest.raises(DataError, match=r"toy: parser 'vlmevl'.*nearest: vlmeval"):
        parser_named("vlmevl", "toy")


def test_metrics_by_hand():
    labels = ["yes"] * 5 + ["no"] * 5
    predictions = ["yes", "yes", "yes", "no", "no", "yes", "no", "no", "no", "no"]
    found = yes_no_metrics(labels, predictions)
    # tp 3, fp 1, fn 2, tn 4
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["precision"] == pytest.approx(3 / 4)
    assert found["recall"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["yes_ratio"] == pytest.approx(4 / 10)
    assert (found["n"], found["unknown"], found["warnings"]) == (10, 0, [])
    assert found["ci"][0] < 0.7 < found["ci"][1]


def test_undecided_answers_are_wrong_and_recall_follows_the_parser():
    labels = ["yes", "yes", "no", "no"]
    predictions = ["yes", "unknown", "unknown", "no"]
    strict, lmms = (yes_no_metrics(labels, predictions, unknown_is_no=flag) for flag in (True, False))
    assert strict["accuracy"] == lmms["accuracy"] == 0.5
    assert strict["recall"] == 0.5
    assert lmms["recall"] == 1.0
    assert strict["unknown"] == 2


def test_division_by_zero_is_zero_and_said():
    found = yes_no_metrics(["no", "no"], ["no", "no"])
    assert (found["precision"], found["recall"], found["f1"]) == (0.0, 0.0, 0.0)
    assert [line.split()[0] for line in found["warnings"]] == ["precision", "recall"]
    assert yes_no_metrics([], [])["ci"] == [0.0, 1.0]
