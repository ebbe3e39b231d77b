"""Reading at random: across shards, processes and addresses."""

import copy
import os
from pathlib import Path

import fsspec
import pytest

from vlm.data.errors import DataError
from vlm.data.index import build_index, load_manifest
from vlm.data.schema import Message, Part, Sample
from vlm.data.store import Store
from vlm.data.write import write_shards


def sample(number: int) -> Sample:
    return Sample(f"s{number}", (Message("user", (Part("text", f"text {number}"),)),))


def text(read: Sample) -> str:
    return read.messages[0].content[0].text


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(write_shards(map(sample, range(10)), tmp_path, max_count=4))


def test_numbers_keys_and_samples_agree(store: Store):
    assert len(store) == 10
    for number in (9, 0, 4, 3, 7):
        assert store.key(number) == f"s{number}" and store.by_key(f"s{number}") == number
        assert text(store.read(number)) == f"text {number}"
    with pytest.raises(DataError, match="sample s10: expected a key of this data set"):
        store.by_key("s10")
    for number in (-1, 10):
        with pytest.raises(IndexError, match=f"below 10, found {number}"):
            store.read(number)


def test_a_copy_opens_files_of_its_own(store: Store):
    store.read(0)
    other = copy.copy(store)  # through the state that pickling takes
    assert not store._files.keys() & other._files.keys()
    assert [text(item) for item in other] == [f"text {n}" for n in range(10)]


def test_a_forked_process_opens_files_of_its_own(store: Store):
    store.read(0)
    before = set(store._files.values())
    child = os.fork()
    if child == 0:
        good = text(store.read(0)) == "text 0" and not before & set(store._files.values())
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert text(store.read(1)) == "text 1"


def test_a_shard_that_shrank_while_reading_is_named(store: Store, tmp_path: Path):
    store.key(0)
    os.truncate(tmp_path / "shard-000000.tar", 600)
    with pytest.raises(DataError, match=r"sample s2: .*shard-000000.tar: expected \d+ bytes at \d+, found 0"):
        store.read(2)


def test_bad_json_fails_when_it_is_read_and_keeps_its_place(tmp_path: Path):
    write_shards(map(sample, range(3)), tmp_path)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"text 1", b"text \xff"))
    store = Store(build_index(tmp_path))
    assert [store.key(n) for n in range(3)] == ["s0", "s1", "s2"] and text(store.read(2)) == "text 2"
    with pytest.raises(DataError, match="sample s1: json: expected utf-8, found byte 0xff"):
        store.read(1)


def test_an_index_that_the_manifest_does_not_mean_is_refused(tmp_path: Path):
    manifest = write_shards(map(sample, range(3)), tmp_path / "a")
    write_shards([sample(7), sample(8), sample(9)], tmp_path / "b")
    for name in ("shard-000000.tar", "shard-000000.index.json"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(DataError, match="its index and the manifest disagree; run `vlm data index`"):
        Store(manifest).key(0)


def test_remote_shards_are_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards(map(sample, range(5)), tmp_path, max_count=3)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("shard-*"):
        memory.pipe(f"/store/{path.name}", path.read_bytes())
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (memory, address.removeprefix("s3:/")))
    store = Store(load_manifest([f"s3://store/shard-00000{n}.tar" for n in range(2)]))
    assert [text(item) for item in store] == [f"text {n}" for n in range(5)]
    memory.rm("/store/shard-000001.index.json")
    assert len(load_manifest("s3://store/shard-{000000..000001}.tar")) == 5
