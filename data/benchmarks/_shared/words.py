"""English on the level of single words: tokens with their places, singulars, articles.

CHAIR needs singulars, and its known implementations take them from NLTK or `pattern`, whose data must be on disk and
whose versions move the score by a point or two. This one is rules with exceptions and needs nothing; it is for nouns,
and what it makes of other words does not matter as long as no name of an object comes out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "grandchildren": "grandchild",
    "mice": "mouse", "lice": "louse", "dice": "die", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "oxen": "ox", "cacti": "cactus", "bookshelves": "bookshelf", "calves": "calf", "elves": "elf",
    "halves": "half", "hooves": "hoof", "jackknives": "jackknife", "knives": "knife", "leaves": "leaf",
    "lives": "life", "loaves": "loaf", "penknives": "penknife", "scarves": "scarf", "selves": "self",
    "shelves": "shelf", "thieves": "thief", "wharves": "wharf", "wives": "wife", "housewives": "housewife",
    "midwives": "midwife", "wolves": "wolf", "werewolves": "werewolf", "tvs": "tv", "cds": "cd", "pcs": "pc",
    "buses": "bus", "minibuses": "minibus", "omnibuses": "omnibus", "trolleybuses": "trolleybus",
    "busses": "bus", "gases": "gas", "lenses": "lens", "irises": "iris", "octopuses": "octopus",
    "walruses": "walrus", "cactuses": "cactus", "crocuses": "crocus", "viruses": "virus",
    "campuses": "campus", "canvases": "canvas", "atlases": "atlas", "pancreases": "pancreas",
    "hippopotamuses": "hippopotamus", "platypuses": "platypus", "hibiscuses": "hibiscus",
    "quizzes": "quiz", "skis": "ski", "taxis": "taxi", "rhinoceroses": "rhinoceros",
    "aches": "ache", "headaches": "headache", "moustaches": "moustache", "mustaches": "mustache",
    "axes": "axe", "pickaxes": "pickaxe", "caches": "cache", "avalanches": "avalanche",
}  # fmt: skip
UNCHANGED = frozenset(
    {
        "scissors", "sheep", "deer", "fish", "series", "species", "headquarters", "binoculars", "goggles",
        "jeans", "pants", "shorts", "trousers", "tongs", "pliers", "tweezers", "pajamas", "clothes", "gas",
        "bus", "lens", "iris", "canvas", "atlas", "bias", "chaos", "cosmos", "rhinoceros", "always",
        "perhaps", "news", "tennis", "swiss", "christmas", "yes", "his", "its", "has", "was", "does", "as",
        "is", "us", "this", "thus", "plus", "sports", "specimen", "regimen", "abdomen", "omen", "semen",
        "stamen", "acumen", "ramen", "hymen", "bitumen",
    }
)  # fmt: skip
SINGULAR_IN_IE = frozenset(
    {
        "movie", "cookie", "brownie", "zombie", "hoodie", "selfie", "smoothie", "birdie", "doggie", "kiddie",
        "veggie", "collie", "genie", "goalie", "rookie", "pixie", "prairie", "calorie", "bookie", "eerie",
        "junkie", "hippie", "cowrie", "budgie", "magpie", "potpie", "townie", "tie", "pie", "die", "lie",
        "necktie", "bowtie", "untie", "bourgeoisie", "sortie", "eyrie",
    }
)  # fmt: skip
SINGULAR_IN_OE = frozenset(
    {
        "shoe", "canoe", "toe", "hoe", "doe", "oboe", "foe", "roe", "horseshoe", "snowshoe", "tiptoe",
        "mistletoe", "aloe",
    }
)  # fmt: skip
_PUNCTUATED = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]|_")
_HISSING = ("ches", "shes", "xes", "sses", "zzes")


@dataclass(frozen=True)
class Token:
    """A word or a punctuation mark, lower-case, with its place [start, end) in the text it came from."""

    text: str
    start: int
    end: int

    @property
    def is_word(self) -> bool:
        return self.text[0].isalnum()


def tokenise(text: str) -> list[Token]:
    """Words (hyphenated ones stay whole) and single punctuation marks, in order; "dog's" is three: dog ' s."""
    return [Token(match.group().lower(), *match.span()) for match in _PUNCTUATED.finditer(text)]


def count_words(text: str) -> int:
    """Words separated by blanks that hold at least one letter or digit: what a caption's length means here."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


@lru_cache(maxsize=65536)
def singularise(word: str) -> str:
    """The singular of a lower-case English noun; a singular, and most words that are no nouns, come back unchanged.

    >>> [singularise(word) for word in ("knives", "buses", "glasses", "scissors", "toothbrushes")]
    ['knife', 'bus', 'glass', 'scissors', 'toothbrush']
    """
    if word in UNCHANGED:
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("men") and len(word) > 4:
        return word[:-3] + "man"
    if len(word) <= 2 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return _drop_ending(word)


def _drop_ending(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if word[:-1] in SINGULAR_IN_IE else word[:-3] + "y"
    if word.endswith("oes"):
        return word[:-1] if word[:-1] in SINGULAR_IN_OE else word[:-2]
    return word[:-2] if word.endswith(_HISSING) else word[:-1]


def article(noun: str) -> str:
    """ "a" or "an", by the first letter; right for every noun of COCO and of Scenes."""
    return "an" if noun[:1].lower() in "aeiou" and noun else "a"
