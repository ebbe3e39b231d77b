"""Hostile and broken shards: each is named, none is followed."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.data.errors import DataError
from vlm.data.tar import JSON_BYTES, read_entries, scan

Member = tuple[str, bytes]


def tar(*members: Member | tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def written(folder: Path, content: bytes) -> str:
    path = folder / "x.tar"
    path.write_bytes(content)
    return str(path)


GOOD = (("a/1.0.png", b"p"), ("a/1.1.jpg", b"q" * 600), ("a/1.json", b"{}"), ("b.json", b"[]"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_those_of_the_content(tmp_path: Path, format: int):
    long = "k" * 150
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as archive:
        for name, content in [*GOOD, *([] if format == tarfile.USTAR_FORMAT else [(f"{long}.json", b"7")])]:
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archive.addfile(special("folder", tarfile.DIRTYPE))
    content = (tmp_path / "x.tar").read_bytes()
    entries = read_entries(str(tmp_path / "x.tar"))
    found = {}
    for entry in entries:
        for number, member in {-1: entry.json, **entry.media}.items():
            assert member is not None
            found[entry.key, number, member.ext] = content[member.offset : member.offset + member.size]
    assert found[("a/1", 0, "png")] == b"p" and found[("a/1", 1, "jpg")] == b"q" * 600
    assert found[("a/1", -1, "json")] == b"{}" and found[("b", -1, "json")] == b"[]"
    assert format == tarfile.USTAR_FORMAT or found[(long, -1, "json")] == b"7"


BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty shard: expected a tar with samples, found 0 bytes"),
    "empty shard": (tar(), "empty shard: expected samples, found none"),
    "gzip": (gzip.compress(tar(*GOOD)), "expected a plain tar, found gzip"),
    "no tar": (b"hello" * 200, "file could not be opened|invalid header|truncated"),
    "cut in a member": (tar(*GOOD)[: 512 * 3 + 100], "truncated tar: 'a/1.1.jpg': expected 600 bytes, the file ends"),
    "cut in the filling": (tar(*GOOD)[: 512 * 4 + 100], "truncated or damaged tar: unexpected end of data"),
    "cut between members": (tar(*GOOD)[: 512 * 2], "truncated tar: expected the end mark at byte 1024, found none"),
    "cut in the end mark": (tar(*GOOD)[: 512 * 9 + 512], "truncated tar: expected the end mark at byte 4608"),
    "damaged header": (tar(*GOOD)[:1024] + b"\xff" * 512 + tar(*GOOD)[1536:], "truncated tar: expected the end mark"),
    "two in one": (tar(*GOOD) + tar(("c.json", b"{}")), "expected nothing after the end mark at byte 4608, found data"),
    "climbing": (tar(("../../a.json", b"{}")), r"member '../../a.json': expected a path inside the archive"),
    "climbing inside": (tar(("a/../../b.json", b"{}")), "expected a path inside the archive"),
    "absolute": (tar(("/etc/a.json", b"{}")), "member '/etc/a.json': expected a path inside the archive"),
    "absolute behind a dot": (tar((".//etc/a.json", b"{}")), "expected a path inside the archive"),
    "backslash": (tar(("a\\..\\b.json", b"{}")), "expected a path inside the archive"),
    "symbolic link": (tar(special("a.json", tarfile.SYMTYPE, "/etc/passwd")), "expected a regular file, found a link"),
    "hard link": (tar(special("a.json", tarfile.LNKTYPE, "b")), "expected a regular file, found a link"),
    "device": (tar(special("a.json", tarfile.CHRTYPE)), "expected a regular file, found a link, a device"),
    "fifo": (tar(special("a.json", tarfile.FIFOTYPE)), "expected a regular file"),
    "key again later": (tar(("a.json", b"{}"), ("b.json", b"{}"), ("a.json", b"{}")), "a: duplicate key: expected the"),
    "key twice in a row": (tar(("a.json", b"{}"), ("a.json", b"{}")), "a: duplicate key: the json is there twice"),
    "medium twice": (tar(("a.0.png", b"1"), ("a.0.jpg", b"2"), ("a.json", b"{}")), "duplicate key: medium 0 is there"),
    "dot in the key": (tar(("v1.5_0002.json", b"{}")), r"member 'v1.5_0002.json': key with a dot: readers would merge"),
    "dot in a medium's key": (tar(("v1.x.0.png", b"")), "key with a dot"),
    "dot in a folder": (tar(("v1.5/a.json", b"{}")), "key: expected letters, digits, _ - /, found a dot"),
    "strange key": (tar(("a b.json", b"{}")), "key: expected letters, digits, _ - /, found other"),
    "name that is no text": (tar(("a\udcff.json", b"{}")), "key: expected letters"),
    "no extension": (tar(("README", b"")), "member 'README': expected <key>.json or <key>.<n>.<ext>"),
    "unknown extension": (tar(("a.0.gif", b"")), "unknown extension: expected json, png, .*, found 'gif'"),
    "medium without number": (tar(("a.jpg", b""), ("a.json", b"{}")), "expected a numbered medium such as <key>.0.jpg"),
    "no json": (tar(("a.0.png", b"")), "expected the member 'a.json', found only media"),
    "gap in the media": (tar(("a.0.png", b""), ("a.2.png", b""), ("a.json", b"{}")), r"without a gap, found \[0, 2\]"),
    "huge json": (tar(("a.json", bytes(JSON_BYTES + 1))), f"json: expected at most {JSON_BYTES} bytes"),
    **{
        f"{ext} member": (tar(("a.json", b"{}"), (f"a.{ext}", b"cos\nsystem\n")), f"'a.{ext}': pickle member")
        for ext in ("pkl", "pickle", "pth", "pt", "npy", "0.pkl", "PKL")
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_named(name: str, tmp_path: Path):
    content, message = BAD[name]
    address = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_entries(address)
    assert str(caught.value).startswith(f"{address}: ") and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_scan_goes_on_after_a_bad_member(tmp_path: Path):
    found = scan(
        written(tmp_path, tar(GOOD[3], ("c.pkl", b""), ("d.json", b"{}"), ("../e.json", b""), ("f.json", b"{}")))
    )
    assert [entry.key for entry in found.entries] == ["b", "d", "f"]
    assert [problem.key for problem in found.problems] == ["c", ""]


@pytest.mark.parametrize("cut", [lambda size: size - 512, lambda size: size // 2, lambda _: 1])
def test_every_cut_is_seen(cut: Callable[[int], int], tmp_path: Path):
    whole = tar(*((f"k{n}.json", b"{}") for n in range(3)))
    end = 3 * 1024 + 1024
    assert whole[end:].strip(b"\0") == b""
    with pytest.raises(DataError, match=r"truncated|invalid|opened|empty"):
        read_entries(written(tmp_path, whole[: cut(end)]))
