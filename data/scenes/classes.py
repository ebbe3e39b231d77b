"""The 24 things of the Scenes world: what they are called, where they are expected, how they look.

Six contexts of four slots each: class `4 * context + slot`. A context gives its classes their
shape and a slot its colour, so the glyph of a class is unique. The names are ordinary nouns with synonyms, regular and
irregular plurals, and two-word names that CHAIR's table of double words knows, so that the whole text path of CHAIR is
exercised on truth that is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTEXTS = ("kitchen", "street", "farm", "office", "home", "beach")
SHAPES = ("disk", "square", "triangle", "cross", "ring", "bar")
# red, green, blue, yellow as fractions of full intensity: far from each other and from any background grey
COLOURS = ((0.90, 0.20, 0.20), (0.20, 0.80, 0.20), (0.25, 0.35, 0.95), (0.90, 0.85, 0.20))
SLOTS = len(COLOURS)


@dataclass(frozen=True)
class ObjectClass:
    """What a class is called; its place in CLASSES is its number."""

    name: str
    plural: str
    synonyms: tuple[str, ...]


CLASSES = (
    ObjectClass("cup", "cups", ("mug", "teacup")),
    ObjectClass("fork", "forks", ("prong",)),
    ObjectClass("knife", "knives", ("blade", "cutter")),
    ObjectClass("plate", "plates", ("dish", "saucer")),
    ObjectClass("car", "cars", ("automobile", "sedan")),
    ObjectClass("stop sign", "stop signs", ("signpost",)),
    ObjectClass("traffic light", "traffic lights", ("traffic signal", "stop light", "stoplight")),
    ObjectClass("bench", "benches", ("pew",)),
    ObjectClass("horse", "horses", ("pony", "stallion")),
    ObjectClass("cow", "cows", ("ox", "bull")),
    ObjectClass("sheep", "sheep", ("lamb", "goat")),
    ObjectClass("dog", "dogs", ("puppy", "hound")),
    ObjectClass("laptop", "laptops", ("notebook", "computer")),
    ObjectClass("chair", "chairs", ("stool", "armchair")),
    ObjectClass("cell phone", "cell phones", ("phone", "mobile phone", "smartphone")),
    ObjectClass("book", "books", ("novel", "textbook")),
    ObjectClass("sofa", "sofas", ("couch", "settee")),
    ObjectClass("lamp", "lamps", ("lantern",)),
    ObjectClass("cat", "cats", ("kitten", "kitty")),
    ObjectClass("vase", "vases", ("urn", "jar")),
    ObjectClass("umbrella", "umbrellas", ("parasol",)),
    ObjectClass("person", "people", ("man", "woman", "child")),
    ObjectClass("boat", "boats", ("canoe", "ship")),
    ObjectClass("kite", "kites", ("glider",)),
)
NAMES = tuple(item.name for item in CLASSES)


def context_of(number: int) -> int:
    """Index into CONTEXTS and SHAPES of a class number."""
    return number // SLOTS


def slot_of(number: int) -> int:
    """Index into COLOURS of a class number; slot 0 is the most expected thing of its context."""
    return number % SLOTS
