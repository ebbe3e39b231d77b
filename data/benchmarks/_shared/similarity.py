"""How alike two words are: by a file of word vectors, by a named function, or not at all ("exact")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.data.benchmarks._shared.files import read_text
from vlm.data.benchmarks._shared.plugins import find_plugin
from vlm.data.errors import DataError

Similarity = Callable[[str, str], float]
EXACT = "exact"


@dataclass(frozen=True)
class VectorSimilarity:
    """Cosine of word vectors; a word without a vector is like itself only."""

    vectors: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: str | Path, words: Iterable[str], benchmark: str) -> VectorSimilarity:
        """The vectors of `words` from a text file in GloVe's or word2vec's form: a word and its numbers per line.

        Raises:
            DataError: no such file, a line that is no vector, or two lengths.
        """
        wanted, vectors = set(words), {}
        lines = read_text(path, benchmark, "file of word vectors").splitlines()
        width = 0
        for number, line in enumerate(lines, start=1):
            word, *numbers = line.rstrip().split(" ")
            if (number == 1 and len(numbers) == 1) or word not in wanted:
                continue  # word2vec's first line counts words and dimensions
            try:
                vector = np.array(numbers, dtype=np.float64)
            except ValueError:
                raise DataError(f"{benchmark}: {path}:{number}: expected a word and numbers, found {line!r}") from None
            width = width or len(vector)
            if len(vector) != width or not width:
                raise DataError(f"{benchmark}: {path}:{number}: expected {width} numbers, found {len(vector)}")
            length = float(np.linalg.norm(vector))
            vectors[word] = vector / length if length else vector
        return cls(vectors)

    def __call__(self, first: str, second: str) -> float:
        if first == second:
            return 1.0
        a, b = self.vectors.get(first), self.vectors.get(second)
        return 0.0 if a is None or b is None else float(a @ b)


def open_similarity(name: str, words: Iterable[str], benchmark: str) -> Similarity | None:
    """The similarity of that name for the given words, None for "exact".

    Raises:
        DataError: neither "exact", nor the path of a file of vectors, nor known otherwise.
    """
    if name == EXACT:
        return None
    if Path(name).suffix in (".txt", ".vec"):
        return VectorSimilarity.read(name, words, benchmark)
    return find_plugin("similarity", name, (EXACT, "a .txt or .vec file of vectors"), f"{benchmark}: similarity")
