"""Preference pairs in the forms users have become samples with a rejected answer."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.commands import main
from vlm.data.errors import DataError
from vlm.data.importers.rlhf_v import read_rlhf_v
from vlm.data.index import load_manifest
from vlm.data.schema import Message, Part
from vlm.data.store import Store

PAIR = {"question": "<image>\nWhat is there?", "chosen": "A cup.", "rejected": "A cup and a fork."}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images/a.png")
    return tmp_path / "images"


def written(folder: Path, records: Any, name: str = "pairs.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", **PAIR},
        {"image_path": "a.png", "text": json.dumps(PAIR)},
        {"image_path": "a.png", "text": PAIR, "idx": 7},
    ],
)
def test_a_pair_in_each_form(record: dict[str, Any], images: Path, tmp_path: Path) -> None:
    for name in ("pairs.json", "pairs.jsonl"):
        (sample,) = read_rlhf_v(written(tmp_path, [{**record, "origin": "x"}], name), images)
        assert sample.key == str(record.get("idx", 0))
        assert sample.messages == (
            Message("user", (Part("image", ref=0), Part("text", "What is there?"))),
            Message("assistant", (Part("text", "A cup."),)),
        )
        assert sample.rejected == (Message("assistant", (Part("text", "A cup and a fork."),)),)
        assert sample.media == ((images / "a.png").read_bytes(),) and sample.meta == {"origin": "x"}


def test_a_parquet_file_brings_its_images(images: Path, tmp_path: Path) -> None:
    table, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO((images / "a.png").read_bytes()).getvalue()
    rows = [{"image": {"bytes": content, "path": "a.png"}, "text": json.dumps(PAIR), "idx": n} for n in range(3)]
    parquet.write_table(table.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    found = list(read_rlhf_v(tmp_path / "pairs.parquet", tmp_path))
    assert [sample.key for sample in found] == ["0", "1", "2"] and found[1].media == (content,)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.png", **PAIR, "rejected": "A cup."}, "rejected: expected another answer than chosen"),
        ({"image": "a.png", "question": "x", "chosen": "y"}, "rejected: expected text, found None"),
        ({"image": "../a.png", **PAIR}, "expected a path inside the image folder"),
        ({"image": "b.png", **PAIR}, "expected the file"),
        ({**PAIR}, "image: expected a path or bytes, found None"),
        ({"image": "a.png", "text": "{"}, "text: expected json of a pair"),
        ("x", "record 0: expected an object"),
    ],
)
def test_what_is_no_pair_is_named_or_skipped(record: Any, message: str, images: Path, tmp_path: Path) -> None:
    path = written(tmp_path, [record, {"image": "a.png", "id": "good", **PAIR}])
    with pytest.raises(DataError, match=message):
        list(read_rlhf_v(path, images))
    assert [sample.key for sample in read_rlhf_v(path, images, on_bad="skip")] == ["good"]


def test_the_command_writes_shards(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [{"image": "a.png", **PAIR}])
    assert main(["data", "pack", "rlhf-v", str(path), "--images", str(images), "--out", str(tmp_path / "out")]) == 0
    (sample,) = Store(load_manifest(tmp_path / "out"))
    assert sample.rejected and "1 samples" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "out")]) == 0
