import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.errors import DataError
from vlm.data.importers.coco_captions import PROMPT, read_coco_captions
from vlm.data.schema import Message, Part
from vlm.data.store import Store
from vlm.data.write import write_shards

RECORD: dict[str, Any] = {
    "licenses": [{"id": 4, "name": "CC BY"}],
    "images": [
        {"id": 9, "file_name": "9.jpg", "license": 4},
        {"id": 5, "file_name": "5.jpg"},
        {"id": 6, "file_name": "6.jpg"},
    ],
    "annotations": [
        {"id": 30, "image_id": 9, "caption": "A second.\n"},
        {"id": 4, "image_id": 9, "caption": " A first."},
        {"id": 5, "image_id": 5, "caption": "A third."},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (9, 5):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
    return tmp_path


def read(folder: Path, record: Any = RECORD, **options: Any) -> list:
    path = folder / "captions.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    return list(read_coco_captions(path, folder, **options))


def test_one_sample_per_caption(folder: Path):
    samples = read(folder)
    assert [sample.key for sample in samples] == ["9-4", "9-30", "5-5"]
    assert samples[0].messages == (
        Message("user", (Part("image", ref=0), Part("text", PROMPT))),
        Message("assistant", (Part("text", "A first."),)),
    )
    assert samples[1].messages[1].content[0].text == "A second."
    assert samples[0].media == ((folder / "9.jpg").read_bytes(),) and samples[0].media_ext == ("jpg",)
    assert [sample.license for sample in samples] == ["CC BY", "CC BY", ""]
    assert len(write_shards(samples, folder / "shards")) == 3


def test_one_sample_per_image_keeps_all_captions(folder: Path):
    samples = read(folder, per="image", prompt="Say it.")
    assert [sample.key for sample in samples] == ["9", "5"]
    assert samples[0].messages[0].content[1].text == "Say it."
    assert samples[0].messages[1].content[0].text == "A first."
    store = Store(write_shards(samples, folder / "shards"))
    assert store.read(0).meta == {"image_id": 9, "file_name": "9.jpg", "captions": ["A first.", "A second."]}


def test_missing_images_stop_or_are_skipped(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "9.jpg").unlink()
    with pytest.raises(DataError, match=r"sample 9-4: image: expected the file .*9.jpg, found none"):
        read(folder)
    assert [sample.key for sample in read(folder, on_bad="skip")] == ["5-5"]
    assert "2 samples skipped" in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "expected a list 'images', found none"),
        ([], "expected a list 'images', found none"),
        ({**RECORD, "images": [{"id": 1}]}, r"images\[0\]: expected file_name"),
        ({**RECORD, "annotations": [{"id": 1, "image_id": 9}]}, r"annotations\[0\]: expected caption"),
        ({**RECORD, "annotations": [{"id": 1, "image_id": 7, "caption": ""}]}, "expected a listed image, found id 7"),
        (
            {**RECORD, "images": [{"id": 9, "file_name": "../9.jpg"}], "annotations": RECORD["annotations"][:2]},
            "inside",
        ),
    ],
)
def test_bad_files_are_named(folder: Path, record: Any, message: str):
    with pytest.raises(DataError, match=message):
        read(folder, record)


def test_an_unknown_way_is_refused(folder: Path):
    with pytest.raises(DataError, match="per: expected caption or image, found 'both'"):
        read(folder, per="both")
