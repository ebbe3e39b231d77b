"""Files of benchmarks, replies of judges, word vectors: read, or refused in one line."""

import json

import pytest

from vlm.data.benchmarks._shared.files import need, read_csv, read_json, read_records, yes_no_label
from vlm.data.benchmarks._shared.judge import Request, SavedJudge, open_judge, write_requests
from vlm.data.benchmarks._shared.plugins import PLUGINS
from vlm.data.benchmarks._shared.similarity import open_similarity
from vlm.data.errors import DataError


def test_records_of_lines_and_of_an_array(tmp_path):
    path = tmp_path / "a"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert read_records(path, "toy") == [{"a": 1}, {"a": 2}]
    path.write_text('[{"a": 1}]')
    assert read_records(path, "toy") == [{"a": 1}]
    assert read_json(path, "toy") == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no questions"),
        (b"[1]", "record 1: expected an object, found 1"),
        (b"{", "neither JSON lines nor a JSON array"),
        (b'{"a": "\xff"}', "expected UTF-8, found .* at byte 7"),
    ],
)
def test_bad_records(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(tmp_path / "a", "toy")
    assert "\n" not in str(caught.value)


def test_a_table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,"x, ""y""\nz"\n')
    assert read_csv(path, "toy", ["a"]) == [{"a": "1", "b": 'x, "y"\nz'}]
    path.write_text("a,b\n1\n")
    with pytest.raises(DataError, match=r"t\.csv:2: expected 2 fields as in the header"):
        read_csv(path, "toy", ["a"])


def test_labels_and_keys():
    assert [yes_no_label(text, "x") for text in ("Yes", " NO ")] == ["yes", "no"]
    with pytest.raises(DataError, match="place: label 1 is neither yes nor no"):
        yes_no_label(1, "place")
    with pytest.raises(DataError, match="place lacks b, c; found a"):
        need({"a": 1}, ("a", "b", "c"), "place")


REQUESTS = [Request("1", "Grade this:\nanswer"), Request("2", "Grade that")]


def test_requests_go_out_and_replies_come_back(tmp_path):
    write_requests(REQUESTS, tmp_path / "out.jsonl")
    sent = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in sent] == [request.prompt for request in REQUESTS]
    back = tmp_path / "back.jsonl"
    back.write_text("\n".join(json.dumps({"id": one["id"], "reply": f"to {one['id']}"}) for one in reversed(sent)))
    judge = open_judge(str(back), "rule", "toy")
    assert isinstance(judge, SavedJudge)
    assert judge(REQUESTS) == ["to 1", "to 2"]
    assert open_judge("rule", "rule", "toy") is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "1", "reply": "a"}], "1 of 2 requests have no reply, the first is '2'"),
        ([{"id": "1", "reply": "a"}, {"id": 1, "reply": "b"}], "'1' comes twice|1 comes twice"),
        ([{"id": "1", "text": "a"}], "reply 1 lacks reply; found id, text"),
        ([{"id": "1", "reply": 3}], "reply 1: expected text, found 3"),
    ],
)
def test_bad_replies(tmp_path, lines, message):
    (tmp_path / "back.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=message):
        SavedJudge(str(tmp_path / "back.jsonl"), "toy")(REQUESTS)


def test_named_functions(monkeypatch):
    class Point:
        name = "installed"

        def load(self):
            return lambda requests: ["hi"] * len(requests)

    monkeypatch.setattr(
        "vlm.data.benchmarks._shared.plugins.entry_points", lambda group: [Point()] * (group == "vlm.judge")
    )
    installed = open_judge("installed", "rule", "toy")
    assert installed is not None and installed(REQUESTS) == ["hi", "hi"]
    monkeypatch.setitem(PLUGINS["judge"], "mine", len)
    assert open_judge("mine", "rule", "toy") is len
    with pytest.raises(DataError, match=r"toy: judge 'instaled' is none of rule.*nearest: installed"):
        open_judge("instaled", "rule", "toy")


def test_likeness_of_word_vectors(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("dog 3 4\npuppy 6 8\ncar -4 3\nskipped 1\n")
    alike = open_similarity(str(path), ["dog", "puppy", "car", "cat"], "toy")
    assert alike is not None
    assert [alike("dog", other) for other in ("puppy", "car", "cat")] == pytest.approx([1, 0, 0])
    assert alike("cat", "cat") == 1.0
    assert open_similarity("exact", [], "toy") is None
    path.write_text("dog 1 2\ncar 1\n")
    with pytest.raises(DataError, match=r"v\.txt:2: expected 2 numbers, found 1"):
        open_similarity(str(path), ["dog", "car"], "toy")
    path.write_text("dog one two\n")
    with pytest.raises(DataError, match=r"v\.txt:1: expected a word and numbers"):
        open_similarity(str(path), ["dog"], "toy")
