"""`vlm data check`: every kind of damage found, each on a line of its own, and a good folder is silent."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.check import check
from vlm.data.index import build_index
from vlm.data.schema import Message, Part, Sample
from vlm.data.tar import Problem
from vlm.data.write import write_shards


def png(width: int = 4, height: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def huge_png() -> bytes:
    """A PNG that says how large it is and holds next to nothing."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    coded = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


def document(images: int = 1, **fields: object) -> bytes:
    parts = [{"type": "image", "ref": ref} for ref in range(images)]
    return json.dumps(
        {"v": 1, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], **fields}
    ).encode()


def shard(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


GOOD = (("good.0.png", png()), ("good.json", document()))
CONTENT = {
    "json that is not utf-8": ((("x.json", b"\xff"),), "x", "json: expected utf-8, found byte 0xff at 0"),
    "missing image": (
        (("x.json", document()),),
        "x",
        "placeholder count mismatch: messages show media [0], found media []",
    ),
    "image nobody shows": (
        (("x.0.png", png()), ("x.json", document(images=0))),
        "x",
        "placeholder count mismatch: messages show media [], found media [0]",
    ),
    "image that is no image": (
        (("x.0.png", b"hello"), ("x.json", document())),
        "x",
        "medium 0: image: expected png, jpg, webp or bmp, found bytes 68 65 6c 6c 6f",
    ),
    "image of 1 x 1": (
        (("x.0.png", png(1, 1)), ("x.json", document())),
        "x",
        "medium 0: image: expected sides of at least 2 pixels, found 1 x 1",
    ),
    "image of 20000 x 20000": (
        (("x.0.png", huge_png()), ("x.json", document())),
        "x",
        "medium 0: image: expected at most 89478485 pixels, found 20000 x 20000",
    ),
    "wrong width": (
        (("x.0.png", png()), ("x.json", document(media=[{"w": 5, "h": 4}]))),
        "x",
        "medium 0: media[0].w: expected 5, found 4",
    ),
    "pickle member": (
        (("x.json", document(0)), ("x.pkl", b"cos\nsystem\n")),
        "x",
        "member 'x.pkl': pickle member: it could run code when read; expected json or an image, nothing was read",
    ),
    "climbing path": (
        (("../x.json", document(0)),),
        "",
        "member '../x.json': expected a path inside the archive, found one that climbs out",
    ),
    "key with a dot": (
        (("v1.5.json", document(0)),),
        "v1",
        "member 'v1.5.json': key with a dot: readers would merge samples; replace the dots",
    ),
    "duplicate key": (
        (("x.json", document(0)), *GOOD, ("x.json", document(0))),
        "x",
        "duplicate key: expected the members of a sample side by side, found it again later",
    ),
}


@pytest.mark.parametrize("name", CONTENT)
def test_each_damage_is_one_line(name: str, tmp_path: Path):
    members, key, what = CONTENT[name]
    kept = () if GOOD[0] in members else GOOD
    shard(tmp_path / "a.tar", *members, *kept)
    where = str(tmp_path / "a.tar")
    assert check(tmp_path) == [Problem(where, key, what)]
    (line,) = map(str, check([where]))
    assert line == (f"{where}: {key}: {what}" if key else f"{where}: {what}")


def test_a_wrong_hash_is_found(tmp_path: Path):
    shard(tmp_path / "a.tar", ("x.0.png", png()), ("x.json", document(media=[{"sha256": "0" * 64}])))
    (problem,) = check(tmp_path)
    assert problem.key == "x" and problem.what.startswith(f"medium 0: media[0].sha256: expected {'0' * 64}, found ")


def test_all_problems_of_all_shards_are_listed(tmp_path: Path):
    for number, name in enumerate(CONTENT):
        shard(tmp_path / f"{number:02d}.tar", *CONTENT[name][0], (f"own{number}.json", document(0)))
    found = check(tmp_path)
    assert {problem.what for problem in found} >= {what for _, _, what in CONTENT.values()}


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:700]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "empty shard"),
    "stale size": (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "stale index: expected "),
    "stale content": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"yes", b"no!")),
        "stale index: expected sha256",
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_changed_is_found(name: str, tmp_path: Path):
    good = Sample("k", (Message("user", (Part("text", "yes"),)),))
    write_shards([good], tmp_path)
    damage, what = SHARDS[name]
    damage(tmp_path / "shard-000000.tar")
    assert any(problem.what.startswith(what) for problem in check(tmp_path))


def test_a_key_in_two_shards_is_found(tmp_path: Path):
    for name in "ab":
        shard(tmp_path / f"{name}.tar", *GOOD)
    (problem,) = check(tmp_path)
    assert problem == Problem(str(tmp_path / "b.tar"), "good", f"duplicate key: it is in {tmp_path / 'a.tar'} too")


def test_bad_addresses_are_problems_too(tmp_path: Path):
    found = check([tmp_path / "none.tar", "pipe:touch x", tmp_path])
    assert [problem.what.split(",")[0] for problem in found] == [
        "expected a shard",
        "address 'pipe:touch x': expected a local path or file://",
        "expected a shard",
    ]


def test_a_good_folder_is_silent_and_untouched(tmp_path: Path):
    shard(tmp_path / "a.tar", *GOOD)
    assert check(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    build_index(tmp_path)
    assert check([tmp_path, str(tmp_path / "*.tar")][:1]) == []
