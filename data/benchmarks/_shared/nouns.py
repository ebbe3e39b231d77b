"""The nouns of a caption that a word list knows, by rule: singulars, and a look at the word before.

Tagged captions need NLTK and its data. A list of object words leaves little to tag: a word of the list is a noun
unless it is one of those that are also verbs ("can", "watch") and stands where a verb stands. Words that are
adjectives nearly always ("hot") are none.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from vlm.data.benchmarks._shared.words import Token, singularise, tokenise

NEVER = frozenset({"hot"})
# base forms that are verbs as often as nouns
ALSO_VERBS = frozenset(
    {
        "bail", "bar", "bat", "bill", "book", "box", "brush", "cage", "can", "card", "cash", "clock", "cloud", "drain",
        "drink", "duck", "face", "fence", "file", "fish", "flag", "floor", "fork", "goal", "grill", "ground", "hose",
        "house", "leave", "light", "line", "lock", "lounge", "mirror", "net", "note", "pack", "pad", "paddle", "pan",
        "pen", "pipe", "plate", "plug", "pole", "rail", "range", "ring", "rock", "rope", "sail", "sand", "screen",
        "shell", "shelf", "ship", "shovel", "sign", "signal", "sink", "skate", "ski", "sled", "snack", "snow", "sound",
        "spade", "spray", "stage", "star", "string", "support", "surf", "switch", "table", "tap", "tape", "tie", "tire",
        "toy", "track", "train", "wall", "warp", "watch", "water", "wire",
    }
)  # fmt: skip
_BEFORE_VERBS = frozenset(
    {
        "to", "can", "could", "may", "might", "must", "shall", "should", "will", "would", "do", "does", "did", "not",
        "i", "you", "he", "she", "it", "we", "they", "who", "which", "that", "people", "men", "women", "children",
    }
)  # fmt: skip
# before these words "can" is a tin
_BEFORE_TINS = frozenset(
    {
        "a", "an", "the", "this", "that", "one", "each", "another", "his", "her", "their", "its", "soda", "beer", "tin",
        "trash", "garbage", "spray", "watering", "paint", "metal", "aluminum", "aluminium", "coke", "cola", "drink",
        "red", "blue", "green", "white", "black", "silver", "small", "large", "empty",
    }
)  # fmt: skip


def known_nouns(text: str, vocabulary: Collection[str]) -> list[str]:
    """Every noun of a text that the vocabulary has, as the vocabulary spells it, in order, repeats included.

    >>> known_nouns("Two dogs can be seen beside a can.", {"dog", "can"})
    ['dog', 'can']
    """
    spelling = _spelling(frozenset(vocabulary))
    tokens = tokenise(text)
    found = []
    for place, token in enumerate(tokens):
        word = _lemma(token.text, spelling)
        if word is not None and _is_noun(tokens, place):
            found.append(word)
    return found


@lru_cache(maxsize=16)
def _spelling(vocabulary: frozenset[str]) -> dict[str, str]:
    """Lower-case word -> word of the vocabulary; one that is lower-case there wins."""
    return {word.lower(): word for word in sorted(vocabulary)}


def _lemma(word: str, spelling: dict[str, str]) -> str | None:
    """A word that is in the vocabulary as it stands ("people", "slippers") stays, as it would for WordNet; else its
    singular, if that is there."""
    if word == "people" and word in spelling:
        return spelling[word]
    return spelling.get(singularise(word), spelling.get(word))


def _is_noun(tokens: list[Token], place: int) -> bool:
    word = tokens[place].text
    if word in NEVER:
        return False
    if word not in ALSO_VERBS:
        return True
    before = tokens[place - 1].text if place else ""
    return before in _BEFORE_TINS if word == "can" else before not in _BEFORE_VERBS
