"""Writing: what stock readers see, that nothing half-done is left, and indexes that tell the truth."""

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from vlm.data.errors import DataError
from vlm.data.index import build_index, load_index, load_manifest
from vlm.data.schema import Message, Part, Sample, parse_sample
from vlm.data.store import Store
from vlm.data.write import write_shards


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4 + level, 3), (level, 0, 0)).save(file, "png")
    return file.getvalue()


def sample(number: int, images: int = 1) -> Sample:
    asked = (*(Part("image", ref=ref) for ref in range(images)), Part("text", f"which {number}?"))
    return Sample(
        f"set/{number:03d}",
        (Message("user", asked), Message("assistant", (Part("text", "yes"),))),
        tuple(png(number + ref) for ref in range(images)),
        ("png",) * images,
        tags=("cup", f"t{number % 2}"),
        license="cc0",
    )


SAMPLES = [sample(number, images=number % 3) for number in range(7)]


def without_info(read: Sample) -> dict[str, object]:
    return {name: value for name, value in vars(read).items() if name != "media_info"}


def test_stock_webdataset_reads_our_shards(tmp_path: Path):
    write_shards(SAMPLES, tmp_path, max_count=3)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert [Path(shard).name for shard in shards] == [f"shard-{n:06d}.tar" for n in range(3)]
    read = list(WebDataset(shards, shardshuffle=False))
    assert [item["__key__"] for item in read] == [given.key for given in SAMPLES]
    for item, given in zip(read, SAMPLES, strict=True):
        assert tuple(item[f"{n}.png"] for n in range(len(given.media))) == given.media
        media = {n: ("png", content) for n, content in enumerate(given.media)}
        assert without_info(parse_sample(item["__key__"], item["json"], media)) == without_info(given)


def test_the_store_reads_what_was_written(tmp_path: Path):
    manifest = write_shards(iter(SAMPLES), tmp_path, prefix="p", max_count=3)
    assert manifest.shard_sizes == (3, 3, 1)
    assert (len(manifest), manifest.media, manifest.turns) == (7, 6, 14)
    assert manifest.chars == 7 * len("which 0?yes")
    assert manifest.tags == ("cup", "t0", "t1") and manifest.licenses == ("cc0",)
    read = list(Store(manifest))
    assert [without_info(item) for item in read] == [without_info(given) for given in SAMPLES]
    assert load_manifest(tmp_path) == manifest and load_manifest(tmp_path).hash == manifest.hash


def test_the_index_says_where_everything_is(tmp_path: Path):
    write_shards(SAMPLES, tmp_path)
    shard = tmp_path / "shard-000000.tar"
    content, index = shard.read_bytes(), load_index(str(shard))
    assert index.bytes == len(content) and index.sha256 == hashlib.sha256(content).hexdigest()
    for row, given in zip(index.rows, SAMPLES, strict=True):
        assert json.loads(content[row.offset : row.offset + row.size])["v"] == 1
        assert tuple(content[medium.offset : medium.offset + medium.size] for medium in row.media) == given.media
        sizes = [Image.open(io.BytesIO(medium)).size for medium in given.media]
        assert [(medium.width, medium.height) for medium in row.media] == sizes


def test_the_same_samples_give_the_same_bytes_and_hash(tmp_path: Path):
    one, two = write_shards(SAMPLES, tmp_path / "1"), write_shards(SAMPLES, tmp_path / "2")
    assert one.hash == two.hash and [s.sha256 for s in one.shards] == [s.sha256 for s in two.shards]
    three = write_shards(SAMPLES, tmp_path / "3", max_count=3)
    assert len({one.hash, three.hash, dataclasses.replace(three, shards=three.shards[::-1]).hash}) == 3


def test_a_shard_closes_at_its_size(tmp_path: Path):
    manifest = write_shards(SAMPLES, tmp_path, max_bytes=1)
    assert manifest.shard_sizes == (1,) * 7


def test_long_keys_are_written(tmp_path: Path):
    given = Sample("k" * 200, (Message("user", (Part("text", "x"),)),))
    assert Store(write_shards([given], tmp_path)).key(0) == given.key


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "expected samples to write, found none"),
        ([sample(1), sample(2), sample(1)], "sample set/001: duplicate key"),
        ([sample(1), Sample("a.b", sample(2).messages)], "sample 'a.b': key: expected letters"),
        ([sample(1), Sample("c", sample(2).messages, (b"no image",), ("png",))], "sample c: image: expected png"),
        ([sample(1), Sample("c", sample(2).messages)], "sample c: placeholder count mismatch"),
    ],
)
def test_a_write_that_fails_leaves_nothing(samples: list[Sample], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        write_shards(samples, tmp_path, max_count=1)
    assert list(tmp_path.iterdir()) == []


def test_shards_that_are_there_are_not_overwritten(tmp_path: Path):
    write_shards(SAMPLES, tmp_path)
    with pytest.raises(DataError, match=r"expected a folder without shards, found shard-000000.tar"):
        write_shards(SAMPLES, tmp_path, prefix="other")


def test_a_stale_index_is_refused_and_built_anew(tmp_path: Path):
    write_shards(SAMPLES[:3], tmp_path / "a")
    write_shards(SAMPLES, tmp_path / "b")
    shard = tmp_path / "a" / "shard-000000.tar"
    shard.write_bytes((tmp_path / "b" / "shard-000000.tar").read_bytes())
    for where in (tmp_path / "a", [shard]):
        with pytest.raises(DataError, match=r"stale index: expected \d+ bytes, found \d+; run `vlm data index`"):
            load_manifest(where)
    assert len(build_index(tmp_path / "a")) == 7
    assert len(load_manifest(tmp_path / "a")) == 7


def test_a_shard_the_manifest_does_not_list_is_noticed(tmp_path: Path):
    write_shards(SAMPLES, tmp_path)
    (tmp_path / "more.tar").write_bytes((tmp_path / "shard-000000.tar").read_bytes())
    with pytest.raises(DataError, match=r"stale: 1 shards not listed, such as .*more.tar; run `vlm data index`"):
        load_manifest(tmp_path)
    with pytest.raises(DataError, match=r"set/000: duplicate key: it is in .*more.tar too"):
        build_index(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"not listed|expected a file"):
        load_manifest(tmp_path)


def test_an_index_that_is_missing_is_built_and_kept(tmp_path: Path):
    manifest = write_shards(SAMPLES, tmp_path)
    for sidecar in tmp_path.glob("*.json"):
        sidecar.unlink()
    assert load_manifest(tmp_path) == manifest
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["manifest.json", "shard-000000.index.json"]


def test_a_folder_that_cannot_be_written_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = write_shards(SAMPLES, tmp_path)
    for sidecar in tmp_path.glob("*.json"):
        sidecar.unlink()

    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vlm.data.index.write_atomic", read_only)
    assert [item.key for item in Store(load_manifest(tmp_path))] == [item.key for item in SAMPLES]
    assert load_manifest(tmp_path) == manifest and list(tmp_path.glob("*.json")) == []


def test_a_damaged_index_is_named(tmp_path: Path):
    write_shards(SAMPLES, tmp_path)
    (tmp_path / "shard-000000.index.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"expected an index, found damage.*run `vlm data index`"):
        load_index(str(tmp_path / "shard-000000.tar"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="expected a manifest, found damage"):
        load_manifest(tmp_path)


def test_a_moved_folder_still_works(tmp_path: Path):
    manifest = write_shards(SAMPLES, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = load_manifest(tmp_path / "there")
    assert moved.hash == manifest.hash and Store(moved).read(3).key == "set/003"
