"""Seeded samples to read: photographs-sized JPEGs of smooth noise with a conversation each."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.made import make_folder
from vlm.data.schema import Message, Part, Sample
from vlm.data.write import write_shards

_WORDS = ("a", "the", "dog", "tree", "red", "left", "of", "is", "car", "near", "two", "what", "blue", "small", "street")


def make(folder: Path, count: int, seed: int, per_shard: int, side: tuple[int, int]) -> Path:
    """Shards of `count` samples whose images have sides in the range; made once."""
    stamp = {"count": count, "seed": seed, "per_shard": per_shard, "side": list(side), "version": 1}

    def fill(part: Path) -> None:
        write_shards(_samples(count, seed, side), part, max_count=per_shard)

    return make_folder(folder, stamp, "bench", "samples of bench_data", fill)


def _samples(count: int, seed: int, side: tuple[int, int]) -> Iterator[Sample]:
    for number in range(count):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        messages = []
        for turn in range(int(rng.integers(1, 4))):
            shown = (Part("image", ref=0),) if turn == 0 else ()
            messages.append(Message("user", (*shown, Part("text", text=_text(rng, 6, 16)))))
            messages.append(Message("assistant", (Part("text", text=_text(rng, 10, 60)),)))
        yield Sample(f"s{seed}_{number:06d}", tuple(messages), (_jpeg(rng, side),), ("jpg",), source="bench")


def _text(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(_WORDS[n] for n in rng.integers(0, len(_WORDS), rng.integers(low, high)))


def _jpeg(rng: np.random.Generator, side: tuple[int, int]) -> bytes:
    """Coarse colours made smooth, with grain, so that a file is about as large as a photograph's."""
    width, height = (int(value) for value in rng.integers(side[0], side[1] + 1, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-14, 15, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
    return file.getvalue()
