"""Objects named in a caption: CHAIR's matcher with the place of every mention.

Words are lower-cased and singularised, known pairs of words are merged greedily from the left, and what the
vocabulary knows is mapped to its category. Pairs come from CHAIR's fixed table: a two-word entry of a vocabulary
that is not in the table can never match, in the original too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlm.data.benchmarks._shared.words import singularise, tokenise
from vlm.data.errors import DataError

COCO = "coco"
COCO_FILE = Path(__file__).parent.parent / "coco_synonyms.txt"

_SELF = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat",
    "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear",
    "hair drier", "potted plant", "bow tie", "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
# "home plate" and "train track" are in no vocabulary: they keep "plate" and "train" from being seen.
# "stove top oven" can never match a pair; it stays because the original table has it.
DOUBLE_WORDS: Mapping[str, str] = {
    **{pair: pair for pair in _SELF},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


@dataclass(frozen=True)
class Mention:
    """An object named in a caption at [start, end): `text` as written, `object` its category, `word` the vocabulary's
    word for it."""

    text: str
    start: int
    end: int
    object: str
    word: str = ""


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int


def _merged(caption: str) -> list[_Word]:
    """Singular words and merged pairs of a caption, in order, before any vocabulary."""
    tokens = [_Word(singularise(t.text), t.start, t.end) for t in tokenise(caption)]
    words: list[_Word] = []
    place = 0
    while place < len(tokens):
        pair = tokens[place : place + 2]
        double = DOUBLE_WORDS.get(" ".join(word.text for word in pair)) if len(pair) == 2 else None
        if double is None:
            words.append(tokens[place])
        else:
            words.append(_Word(double, pair[0].start, pair[1].end))
        place += 1 if double is None else 2
    if "toilet" in {word.text for word in words}:
        # "a toilet with its seat up" is no chair
        words = [word for word in words if word.text != "seat"]
    return words


@dataclass(frozen=True)
class Vocabulary:
    """Categories and the words that mean them. `nodes` maps each word (categories included) to its category."""

    nodes: Mapping[str, str] = field(repr=False)
    source: str

    @classmethod
    def parse(cls, text: str, source: str) -> Vocabulary:
        """Read CHAIR's format: a line per category, words separated by commas, the first one names it.

        Raises:
            DataError: a word stands in two lines, or there is none at all.
        """
        nodes: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = [word.strip().lower() for word in line.split(",") if word.strip()]
            for word in words:
                if nodes.setdefault(word, words[0]) != words[0]:
                    raise DataError(
                        f"{source}:{number}: {word!r} is listed under {nodes[word]!r} and {words[0]!r}; expected one"
                    )
        if not nodes:
            raise DataError(f"{source}: expected a line of comma-separated words per category, found none")
        return cls(nodes, source)

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read a file in CHAIR's format, or our own list for COCO's 80 categories when `path` is "coco".

        Raises:
            DataError: no such file, or not in the format.
        """
        file = COCO_FILE if path == COCO else Path(path)
        if not file.is_file():
            raise DataError(f"synonyms: no file {str(path)!r}; expected a path or {COCO!r}")
        return cls.parse(file.read_text(encoding="utf-8"), file.name)

    def category(self, name: str) -> str:
        """The category of a name.

        Raises:
            DataError: the vocabulary does not know it.
        """
        node = self.nodes.get(name.strip().lower())
        if node is None:
            near = difflib.get_close_matches(name.lower(), self.nodes, n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise DataError(f"{self.source}: unknown object {name!r}{hint}")
        return node

    def categories(self, names: Iterable[str]) -> frozenset[str]:
        """The categories of several names."""
        return frozenset(self.category(name) for name in names)

    def mentions(self, caption: str) -> list[Mention]:
        """Every object the caption names, in order, repeats included."""
        return [
            Mention(caption[word.start : word.end], word.start, word.end, self.nodes[word.text], word.text)
            for word in _merged(caption)
            if word.text in self.nodes
        ]
