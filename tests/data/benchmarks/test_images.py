"""Pictures by key, from folders of files and from shards."""

import io

import pytest
from PIL import Image

from vlm.data.benchmarks._shared.contract import Question
from vlm.data.benchmarks._shared.images import ImageSource, missing_images
from vlm.data.errors import DataError
from vlm.data.schema import Message, Part, Sample
from vlm.data.write import write_shards


def picture(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (grey,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def sample(key: str, *pictures: bytes) -> Sample:
    parts = tuple(Part("image", ref=n) for n in range(len(pictures)))
    messages = (Message("user", (*parts, Part("text", text="what?"))), Message("assistant", (Part("text", text="a"),)))
    return Sample(key, messages, media=pictures, media_ext=("png",) * len(pictures))


def test_files_by_name_and_by_key(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "one.png").write_bytes(b"one")
    (tmp_path / "two.jpg").write_bytes(b"two")
    source = ImageSource(tmp_path)
    assert source.read("inside/one.png") == source.read("inside/one") == b"one"
    assert source.read("two") == b"two"


def test_samples_by_key_and_by_name(tmp_path):
    write_shards([sample(f"test/{k}", picture(k)) for k in range(5)], tmp_path / "shards", max_count=2)
    source = ImageSource(tmp_path / "shards")
    assert source.read("test/4") == source.read("test/4.png") == picture(4)


def test_nothing_outside_the_folder_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    for key in ("../secret.png", "../secret", str(tmp_path / "secret.png")):
        with pytest.raises(DataError, match="leads out of"):
            ImageSource(tmp_path / "images").read(key)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        ImageSource(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no image 'three\.png'"):
        ImageSource(tmp_path).read("three.png")
    write_shards([sample("a", picture(1)), sample("b", picture(1), picture(2)), sample("c")], tmp_path / "shards")
    with pytest.raises(DataError, match="sample d"):
        ImageSource(tmp_path / "shards").read("d.png")
    for key, count in (("b", 2), ("c", 0)):
        with pytest.raises(DataError, match=f"has {count} media"):
            ImageSource(tmp_path / "shards").read(key)


def test_missing_images_are_listed_once_and_in_order(tmp_path):
    (tmp_path / "one.png").write_bytes(b"one")
    keys = ["two.png", "one.png", "one", "../one.png", "two.png", "three"]
    assert ImageSource(tmp_path).missing(keys) == ["two.png", "../one.png", "three"]
    write_shards([sample("a", picture(1)), sample("b", picture(1))], tmp_path / "shards")
    assert ImageSource(tmp_path / "shards").missing(["a.png", "c.png", "b"]) == ["c.png"]


def test_missing_images_of_questions(tmp_path):
    (tmp_path / "one.png").write_bytes(b"one")
    questions = [Question("1", ("one.png", "two.png"), "?"), Question("2", (), "?"), Question("3", ("two.png",), "?")]
    assert missing_images(tmp_path, questions) == ["two.png"]
    with pytest.raises(DataError, match="no folder"):
        missing_images(tmp_path / "nowhere", questions)
