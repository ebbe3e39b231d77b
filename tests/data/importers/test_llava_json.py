import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.errors import DataError
from vlm.data.importers.llava_json import read_llava_json
from vlm.data.schema import Message, Part
from vlm.data.store import Store
from vlm.data.write import write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def record(human: str = "<image>\nWhat?", image: Any = "0.png", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": "A <image> cup."}]
    return {"id": "a", "image": image, "conversations": turns, **fields}


def read(folder: Path, *records: Any, **options: Any) -> list:
    path = folder / "data.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return list(read_llava_json(path, folder, **options))


def test_marks_become_references(folder: Path):
    (sample,) = read(folder, record("First <image>\nthen\n<image>", ["1.png", "0.png"], model="m"), source="s")
    assert sample.messages == (
        Message("user", (Part("text", "First "), Part("image", ref=0), Part("text", "then"), Part("image", ref=1))),
        Message("assistant", (Part("text", "A <image> cup."),)),
    )
    assert sample.media == tuple((folder / name).read_bytes() for name in ("1.png", "0.png"))
    assert (sample.key, sample.source, sample.meta) == ("a", "s", {"id": "a", "model": "m"})


def test_turns_count_images_on(folder: Path):
    turns = [{"from": who, "value": "<image>"} for who in ("human", "gpt", "human")]
    (sample,) = read(folder, {"id": 7, "image": ["0.png", "1.png"], "conversations": turns})
    assert [part.ref for message in sample.messages for part in message.content] == [0, -1, 1]


def test_text_only_and_lines(folder: Path):
    path = folder / "data.jsonl"
    lines = [record("hi", None), {"conversations": [{"from": "system", "value": ""}, {"from": "user", "value": "x"}]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_llava_json(path, folder)
    assert first.media == () and second.key == "1"
    assert [message.role for message in second.messages] == ["system", "user"]


def test_what_is_read_can_be_written(folder: Path):
    samples = read(folder, record(), record(), record(id="v1.5"), record("", None, id="empty"))
    store = Store(write_shards(samples, folder / "shards"))
    keys = [store.key(number) for number in range(4)]
    assert keys[0] == "a" and keys[1].startswith("a-") and keys[2].startswith("v1_5-")
    assert store.read(0).messages == samples[0].messages


BAD = {
    "mark without image": (
        record(image=None),
        "placeholder count mismatch: expected 0 <image> marks, found 1",
    ),
    "image without mark": (record("What?"), "placeholder count mismatch: expected 1 <image> marks, found 0"),
    "missing image": (record(image="9.png"), r"image: expected the file .*9.png, found none"),
    "climbing image": (record(image="../0.png"), "expected a path inside the image folder, found '../0.png'"),
    "image of another type": (record(image=[1]), r"image: expected a path or a list of paths, found \[1\]"),
    "no turns": (record(conversations=[]), "conversations: expected a list of turns"),
    "unknown speaker": (
        record(conversations=[{"from": "cat", "value": "x"}]),
        r"\[0\].from: expected one of .*'cat'",
    ),
    "no value": (record(conversations=[{"from": "human"}]), r"conversations\[0\]: expected from and value"),
    "no record": (["x"], "record 0: expected an object, found list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_or_skipped(folder: Path, name: str, caplog: pytest.LogCaptureFixture):
    bad, message = BAD[name]
    with pytest.raises(DataError, match=message):
        read(folder, bad)
    assert [sample.key for sample in read(folder, bad, record(id="b"), on_bad="skip")] == ["b"]
    assert "1 records skipped" in caplog.text


def test_bad_files_are_named(folder: Path):
    with pytest.raises(DataError, match=r"none.json: expected a file, found none"):
        list(read_llava_json(folder / "none.json", folder))
    for content, message in (
        (b"\xff", "expected utf-8 json"),
        (b"{", "expected utf-8 json"),
        (b"{}", "a list of records"),
    ):
        (folder / "x.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_llava_json(folder / "x.json", folder))
