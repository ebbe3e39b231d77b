"""The pictures a benchmark asks about, by key: from a folder of image files or from shards.

Question files name images as files ("COCO_val2014_000000000042.jpg", "test/000123.png"), shards name samples
("test/000123"): a key is taken with or without its extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from vlm.data.benchmarks._shared.contract import Question
from vlm.data.errors import DataError
from vlm.data.index import load_manifest
from vlm.data.store import Store

LISTED = 10  # missing images that an error names
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def _without_extension(key: str) -> str:
    return key[: -len(Path(key).suffix)] if Path(key).suffix.lower() in EXTENSIONS else key


class ImageSource:
    """Encoded images by key. A folder that holds .tar files is read as shards, any other one as image files.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"images: expected a folder of images or of shards, found no folder {str(path)!r}")

    @cached_property
    def _store(self) -> Store | None:
        return Store(load_manifest(self.path)) if any(self.path.glob("*.tar")) else None

    def read(self, key: str) -> bytes:
        """The encoded image of a key.

        Raises:
            DataError: there is none, or the key leads out of the folder.
        """
        return self._read_file(key) if self._store is None else self._read_sample(self._store, key)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no image, each once, in order."""
        return [key for key in dict.fromkeys(keys) if not self._has(key)]

    def _has(self, key: str) -> bool:
        try:
            found = self._file_of(key) if self._store is None else self._store.by_key(_without_extension(key))
            return found is not None
        except DataError:
            return False

    def _read_sample(self, store: Store, key: str) -> bytes:
        sample = store.read(store.by_key(_without_extension(key)))
        if len(sample.media) != 1:
            raise DataError(
                f"images: {self.path}: sample {sample.key!r} has {len(sample.media)} media; expected one image"
            )
        return sample.media[0]

    def _read_file(self, key: str) -> bytes:
        file = self._file_of(key)
        if file is None:
            raise DataError(f"images: {self.path}: no image {key!r}")
        return file.read_bytes()

    def _file_of(self, key: str) -> Path | None:
        for name in (key, *(key + extension for extension in EXTENSIONS)):
            file = self.path / name
            if not file.resolve().is_relative_to(self.path.resolve()):
                raise DataError(f"images: {key!r} leads out of {self.path}")
            if file.is_file():
                return file
        return None


def missing_images(images: str | Path, questions: Iterable[Question]) -> list[str]:
    """The keys that questions name and the source lacks, in order. Raises DataError where there is no such folder."""
    return ImageSource(images).missing(key for question in questions for key in question.images)


def check_images(benchmark: str, images: str | Path, questions: Iterable[Question]) -> None:
    """Refuse a benchmark some of whose pictures are missing, before the first question is asked.

    A score over the others would be another number under the same name.

    Raises:
        DataError: how many of how many are missing, and the first of them by name.
    """
    asked = list(dict.fromkeys(key for question in questions for key in question.images))
    missing = ImageSource(images).missing(asked) if asked else []
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise DataError(
            f"benchmark {benchmark}: {len(missing)} of {len(asked)} images are missing in {images}: "
            f"{', '.join(missing[:LISTED])}{more}"
        )
