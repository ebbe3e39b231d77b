"""What importers share: keys that shards can hold, and images that stay inside their folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

from vlm.data.decode import image_extension
from vlm.data.errors import DataError
from vlm.data.schema import KEY_BYTES

_HASH = 10


class Keys:
    """Makes a legal key of any id, each only once; the same ids in the same order give the same keys."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def make(self, given: str) -> str:
        """The id itself where it can be a key; else signs replaced by _ and a hash of the id put behind."""
        clean = re.sub(r"[^A-Za-z0-9_/-]", "_", given)
        clean = re.sub(r"/(?=/|$)|^/", "_", clean) or "_"
        key = clean if clean == given and len(clean) <= KEY_BYTES else _marked(clean, given)
        repeat = 0
        while key in self._seen:
            repeat += 1
            key = _marked(clean, f"{given}\0{repeat}")
        self._seen.add(key)
        return key


def _marked(clean: str, source: str) -> str:
    mark = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH]
    return f"{clean[: KEY_BYTES - _HASH - 1].rstrip('/')}-{mark}"


def read_image(folder: Path, name: str, key: str) -> tuple[str, bytes]:
    """(extension by content, bytes) of an image below `folder`.

    Links in it are the user's own and are followed.

    Raises:
        DataError: a path that leaves the folder, no such file, or no image.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(f"sample {key}: image: expected a path inside the image folder, found {name!r}")
    try:
        content = (folder / path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"sample {key}: image: expected the file {folder / path}, found none") from None
    return image_extension(content, key), content
