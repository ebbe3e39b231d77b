"""Addresses: what may be opened, and that nothing else ever is."""

from pathlib import Path

import fsspec
import pytest

from vlm.data.address import byte_size, check_address, expand, local_path, open_binary, read_bytes, write_atomic
from vlm.data.errors import DataError


@pytest.mark.parametrize(
    "address",
    [
        *(
            "pipe:touch hacked",
            "PIPE:touch hacked",
            "cmd:ls",
            "simplecache::http://x/a.tar",
            "| touch hacked",
            "cat x |",
        ),
        *("ssh://host/a.tar", "http:a.tar", "github://a:b@/c.tar", "reference://x", "gopen:x"),
    ],
)
def test_what_could_run_a_program_is_refused(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for reader in (check_address, expand, open_binary, read_bytes, byte_size, local_path):
        with pytest.raises(DataError, match=r"expected a local path or file://.*; shell pipes are never run"):
            reader(address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["a.tar", "/x/a.tar", "./a:b.tar", "s3://b/a.tar", "gs://b/a.tar", "hf://datasets/x/a"]
)
def test_what_is_allowed(address: str):
    assert check_address(address) == address
    assert (local_path(address) is None) == ("://" in address)


def test_folders_patterns_and_ranges(tmp_path: Path):
    names = ["s-000.tar", "s-001.tar", "s-002.tar", "other.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    shards = [str(tmp_path / name) for name in names[:3]]
    assert expand(tmp_path) == shards
    assert expand(f"{tmp_path}/s-*.tar") == shards
    assert expand(f"{tmp_path}/s-{{000..002}}.tar") == shards
    assert expand([shards[2], tmp_path]) == [shards[2], *shards[:2]]
    assert expand("s3://b/s-{08..10}.tar") == ["s3://b/s-08.tar", "s3://b/s-09.tar", "s3://b/s-10.tar"]
    with pytest.raises(DataError, match=r"expected a shard, a folder of .tar files or a pattern of them, found none"):
        expand(tmp_path / "no-*.tar")


def test_files_are_read_through_their_address(tmp_path: Path):
    path = tmp_path / "a b.bin"
    path.write_bytes(b"12345")
    for address in (str(path), f"file://{tmp_path}/a%20b.bin"):
        with open_binary(address) as file:
            assert file.read() == b"12345"
        assert byte_size(address) == 5 and read_bytes(address) == b"12345"
    assert read_bytes(str(tmp_path / "none")) is None
    with pytest.raises(DataError, match="expected a file, found none"):
        open_binary(str(tmp_path / "none"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.json", b"old")]


def test_remote_files_go_through_fsspec(monkeypatch: pytest.MonkeyPatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/b/s-0.tar", b"abc")
    memory.pipe("/b/s-1.tar", b"defg")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (memory, address.removeprefix("s3:/")))
    with open_binary("s3://b/s-1.tar") as file:
        assert file.read() == b"defg"
    assert byte_size("s3://b/s-0.tar") == 3 and read_bytes("s3://b/s-0.tar") == b"abc"
    assert read_bytes("s3://b/none") is None
