"""A folder that a maker fills: whole or not at all, and not again when it is there already.

Everything is made in a folder beside the final one and swapped in when whole, with a stamp of what it was made from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm.data.errors import DataError


def make_folder(
    folder: str | Path, stamp: Mapping[str, Any], name: str, title: str, fill: Callable[[Path], None]
) -> Path:
    """Have `fill` make the folder's content unless it was made from the same stamp, and return the folder.

    The stamp goes into `<name>.json`; `title` is what people call the content.

    Raises:
        DataError: the folder holds something else than what this maker made, which making would delete.
    """
    folder = Path(folder)
    file = f"{name}.json"
    if _stamp_of(folder, file, name, title) == stamp:
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        (part / file).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        _swap(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _stamp_of(folder: Path, file: str, name: str, title: str) -> Any:
    """The stamp of what is there, None if there is nothing yet or it was cut short."""
    if (folder / file).is_file():
        try:
            return json.loads((folder / file).read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            return None
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DataError(f"{name}: {folder} holds something else than {title} (no {file}); choose another folder")
    return None


def _swap(part: Path, folder: Path) -> None:
    """Put `part` where `folder` is; what was there goes only when the new one is in place."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
