"""Singulars, tokens and articles against a table written by hand."""

import pytest

from vlm.data.benchmarks._shared.objects import Vocabulary
from vlm.data.benchmarks._shared.words import article, count_words, singularise, tokenise

PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "knife": "knives",
    "bus": "buses", "glass": "glasses", "foot": "feet", "goose": "geese", "calf": "calves", "leaf": "leaves",
    "shelf": "shelves", "wolf": "wolves", "loaf": "loaves", "policeman": "policemen", "fireman": "firemen",
    "bench": "benches", "couch": "couches", "sandwich": "sandwiches", "toothbrush": "toothbrushes", "dish": "dishes",
    "box": "boxes", "mattress": "mattresses", "vase": "vases", "horse": "horses", "purse": "purses",
    "suitcase": "suitcases", "house": "houses", "orange": "oranges", "donut": "donuts", "glove": "gloves",
    "stove": "stoves", "wave": "waves", "tie": "ties", "bowtie": "bowties", "cookie": "cookies", "puppy": "puppies",
    "pony": "ponies", "berry": "berries", "canary": "canaries", "potato": "potatoes", "tomato": "tomatoes",
    "shoe": "shoes", "canoe": "canoes", "ski": "skis", "taxi": "taxis", "tv": "tvs", "cow": "cows", "ox": "oxen",
    "boy": "boys", "trolley": "trolleys", "airplane": "airplanes", "lens": "lenses", "octopus": "octopuses",
    "quiz": "quizzes", "frisbee": "frisbees", "ewe": "ewes", "zebra": "zebras", "broccoli": "broccoli",
}  # fmt: skip
SINGULARS = ["bus", "glass", "gas", "grass", "tennis", "scissors", "sheep", "specimen", "dress", "cactus", "is", "this"]


@pytest.mark.parametrize(("singular", "plural"), PLURALS.items())
def test_plural_gives_its_singular(singular, plural):
    assert singularise(plural) == singular


@pytest.mark.parametrize("word", [*PLURALS, *SINGULARS])
def test_singular_stays(word):
    assert singularise(word) == word


def test_every_word_of_the_coco_list_is_its_own_singular():
    words = {part for entry in Vocabulary.read("coco").nodes for part in entry.split()}
    # the category "skis" is plural in COCO; its line has "ski" as well
    assert {word for word in words if singularise(word) != word} == {"skis"}


def test_tokens_keep_their_places():
    text = "A Dog's hot-dog, isn't it?  (two)"
    tokens = tokenise(text)
    assert [t.text for t in tokens] == [
        "a",
        "dog",
        "'",
        "s",
        "hot-dog",
        ",",
        "isn",
        "'",
        "t",
        "it",
        "?",
        "(",
        "two",
        ")",
    ]
    assert all(text[t.start : t.end].lower() == t.text for t in tokens)
    assert [t.text for t in tokens if not t.is_word] == ["'", ",", "'", "?", "(", ")"]


def test_length_counts_words_and_no_marks():
    assert count_words("i see a cup .") == count_words("I see a cup.") == 4
    assert count_words("") == count_words(" - . ") == 0


@pytest.mark.parametrize(("noun", "expected"), [("cup", "a"), ("umbrella", "an"), ("Orange", "an"), ("", "a")])
def test_article(noun, expected):
    assert article(noun) == expected
