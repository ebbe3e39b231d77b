from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.data.errors import DataError
from vlm.data.importers.common import Keys, read_image
from vlm.data.schema import check_key


@given(st.lists(st.text(max_size=230)))
def test_any_ids_become_legal_keys_each_once(ids: list[str]):
    keys, again = Keys(), Keys()
    made = [keys.make(given_id) for given_id in ids]
    assert all(check_key(key) == key for key in made)
    assert len(set(made)) == len(made)
    assert made == [again.make(given_id) for given_id in ids]


def test_legal_ids_stay_and_dots_are_kept_apart():
    keys = Keys()
    assert keys.make("coco/000_1") == "coco/000_1"
    first, second = keys.make("v1.5_2"), keys.make("v1_5.2")
    assert first.startswith("v1_5_2-") and second.startswith("v1_5_2-") and first != second
    assert keys.make("v1_5_2") == "v1_5_2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "images" / "sub" / "a.jpg", "png")
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    (tmp_path / "images" / "text.png").write_text("hello")
    return tmp_path / "images"


def test_the_extension_is_that_of_the_content(folder: Path):
    assert read_image(folder, "sub/a.jpg", "k") == ("png", (folder / "sub" / "a.jpg").read_bytes())


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/hostname", "..\\secret.png"])
def test_paths_that_climb_out_are_refused(folder: Path, name: str):
    with pytest.raises(DataError, match="sample k: image: expected a path inside the image folder, found"):
        read_image(folder, name, "k")


def test_missing_and_wrong_images_are_named(folder: Path):
    with pytest.raises(DataError, match=r"sample k: image: expected the file .*none.png, found none"):
        read_image(folder, "none.png", "k")
    with pytest.raises(DataError, match=r"expected the file .*, found none"):
        read_image(folder, "sub", "k")
    with pytest.raises(DataError, match="sample k: image: expected png, jpg, webp or bmp, found bytes 68 65"):
        read_image(folder, "text.png", "k")
