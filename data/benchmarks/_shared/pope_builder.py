"""POPE's questions from object lists (POPE, Li et al. 2023, section 5, and its official code).

For each image the first three objects of its list are asked about, each followed by one absent object: any
(random), the most frequent (popular), or the one that most often comes with the positive (adversarial). Ties
keep the order of first appearance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.benchmarks._shared.words import article
from vlm.data.errors import DataError

SPLITS = ("random", "popular", "adversarial")
PER_IMAGE = 3
TEMPLATE = "Is there a {} in the image?"


@dataclass(frozen=True)
class Labelled:
    """An image and what is in it, in the order the annotation lists it."""

    image: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Statistics:
    """How often objects occur (`popular`, most frequent first) and with what (`partners` of each,
    likewise)."""

    vocabulary: tuple[str, ...]
    popular: tuple[str, ...]
    partners: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, lists: Iterable[Sequence[str]]) -> Statistics:
        """Count each object and each pair once per image."""
        frequency: Counter[str] = Counter()
        together: dict[str, Counter[str]] = {}
        for objects in lists:
            distinct = list(dict.fromkeys(objects))
            frequency.update(distinct)
            for name in distinct:
                together.setdefault(name, Counter()).update(other for other in distinct if other != name)
        ranked = {name: _by_count(counter) for name, counter in together.items()}
        return cls(tuple(frequency), _by_count(frequency), ranked)


def _by_count(counter: Counter[str]) -> tuple[str, ...]:
    return tuple(sorted(counter, key=lambda name: -counter[name]))


def question_text(name: str, template: str = TEMPLATE, legacy_typo: bool = False) -> str:
    """The template with the right article; `legacy_typo` writes "imange" for vowels, as the first release did."""
    if article(name) == "a":
        return template.format(name)
    fixed = template.replace("a", "an") if legacy_typo else template.replace(" a {}", " an {}")
    return fixed.format(name)


def sample_images(images: Sequence[Labelled], sample: int | None, seed: int) -> list[Labelled]:
    """The images with enough objects, or `sample` of them at random, in their given order.

    Raises:
        DataError: fewer than asked for.
    """
    usable = [item for item in images if len(dict.fromkeys(item.objects)) >= PER_IMAGE]
    if sample is None:
        return usable
    if sample > len(usable):
        raise DataError(f"pope: {sample} images wanted, {len(usable)} of {len(images)} have {PER_IMAGE} objects")
    rng = np.random.Generator(np.random.PCG64(seed))
    return [usable[k] for k in sorted(rng.choice(len(usable), sample, replace=False))]


def _random_absent(vocabulary: Sequence[str], excluded: set[str], rng: np.random.Generator, image: str) -> str:
    absent = [name for name in vocabulary if name not in excluded]
    if not absent:
        raise DataError(f"pope: image {image!r} has no absent object left among {len(vocabulary)} objects")
    return absent[rng.integers(len(absent))]


def _negative(
    split: str, positive: str, excluded: set[str], statistics: Statistics, rng: np.random.Generator, image: str
) -> str:
    ranked = {"popular": statistics.popular, "adversarial": statistics.partners.get(positive, ())}.get(split, ())
    for name in ranked:
        if name not in excluded:
            return name
    return _random_absent(statistics.vocabulary, excluded, rng, image)


def build_pope(
    images: Sequence[Labelled],
    split: str,
    *,
    seed: int = 0,
    sample: int | None = None,
    statistics: Iterable[Sequence[str]] | None = None,
    template: str = TEMPLATE,
    legacy_typo: bool = False,
) -> list[dict[str, Any]]:
    """Records of an official POPE file, in order yes, no, yes, no, ... per image.

    Frequencies come from the sampled images, or from `statistics` (object lists of, say, the training set).
    The same seed samples the same images for every split, so the positive questions of the three splits are
    the same.

    Raises:
        DataError: unknown split, too few images, or an image that holds everything there is.
    """
    if split not in SPLITS:
        raise DataError(f"pope: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    chosen = sample_images(images, sample, seed)
    counted = Statistics.of(statistics if statistics is not None else (item.objects for item in chosen))
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    records: list[dict[str, Any]] = []
    for item in chosen:
        present = dict.fromkeys(item.objects)
        excluded = set(present)
        for positive in list(present)[:PER_IMAGE]:
            negative = _negative(split, positive, excluded, counted, rng, item.image)
            excluded.add(negative)
            for name, label in ((positive, "yes"), (negative, "no")):
                text = question_text(name, template, legacy_typo)
                number = len(records) + 1
                records.append({"question_id": number, "image": item.image, "text": text, "label": label})
    return records
