"""The builder against a slow restatement of POPE's rules, on random object lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.benchmarks._shared.pope_builder import SPLITS, Labelled, Statistics, build_pope, question_text
from vlm.data.errors import DataError

WORDS = [f"{letter}{k}" for letter in "buoz" for k in range(5)]
# lists that hold every word between them see to it that each image has absent objects left
EVERYTHING = [tuple(WORDS[k : k + 5]) for k in range(0, 20, 5)]
object_lists = st.lists(st.lists(st.sampled_from(WORDS), unique=True, max_size=6).map(tuple), max_size=8).map(
    lambda lists: lists + EVERYTHING
)


def images(lists) -> list[Labelled]:
    return [Labelled(f"{number}.png", tuple(objects)) for number, objects in enumerate(lists)]


def asked(record) -> str:
    return record["text"].removeprefix("Is there ").split()[1]


def ranking(candidates, count) -> list[str]:
    """By falling count; ties as they come."""
    return [
        name for n in sorted({count(c) for c in candidates}, reverse=True) for name in candidates if count(name) == n
    ]


def restated(lists, split) -> list[tuple[str, str | None]]:
    """(positive, negative) pairs; None where the rule says: any absent object."""
    used = [list(objects) for objects in lists if len(objects) >= 3]
    order = list(dict.fromkeys(name for objects in used for name in objects))
    pairs = []
    for objects in used:
        taken = []
        for positive in objects[:3]:
            if split == "popular":
                ranked = ranking(order, lambda name: sum(name in one for one in used))
            elif split == "adversarial":
                # ties among partners keep the order in which they first stood beside the positive
                beside = [name for one in used if positive in one for name in one if name != positive]
                partners = list(dict.fromkeys(beside))
                ranked = ranking(partners, beside.count)
            else:
                ranked = []
            negative = next((name for name in ranked if name not in objects and name not in taken), None)
            pairs.append((positive, negative))
            taken.append(negative)
            if negative is None:
                return pairs  # from here on what was taken is chance
    return pairs


@given(object_lists, st.sampled_from(["popular", "adversarial"]))
def test_ranked_negatives_follow_the_rules(lists, split):
    records = build_pope(images(lists), split)
    found = [(asked(yes), asked(no)) for yes, no in zip(records[::2], records[1::2], strict=True)]
    for (positive, negative), (positive_found, negative_found) in zip(restated(lists, split), found, strict=False):
        assert positive_found == positive
        if negative is not None:
            assert negative_found == negative


@given(object_lists, st.sampled_from(SPLITS), st.integers(0, 99))
def test_every_file_has_the_official_form(lists, split, seed):
    records = build_pope(images(lists), split, seed=seed)
    used = [one for one in images(lists) if len(one.objects) >= 3]
    assert [r["question_id"] for r in records] == list(range(1, 6 * len(used) + 1))
    assert [r["label"] for r in records] == ["yes", "no"] * (3 * len(used))
    assert [r["image"] for r in records] == [one.image for one in used for _ in range(6)]
    for number, one in enumerate(used):
        names = [asked(record) for record in records[6 * number : 6 * number + 6]]
        assert names[::2] == list(one.objects[:3])
        assert len(set(names)) == 6
        assert not set(names[1::2]) & set(one.objects)


@given(object_lists, st.integers(0, 99))
def test_splits_share_their_positives_and_seeds_repeat(lists, seed):
    files = [build_pope(images(lists), split, seed=seed) for split in SPLITS]
    keys = [[(r["image"], r["text"]) for r in file[::2]] for file in files]
    assert keys[0] == keys[1] == keys[2]
    assert build_pope(images(lists), "random", seed=seed) == files[0]


def test_random_negatives_are_uniform_over_absent_objects():
    lists = [("b0", "b1", "b2")] * 4000 + [("u0", "u1", "u2")]
    negatives = [asked(r) for r in build_pope(images(lists), "random")[1::2]][: 3 * 4000]
    assert {name: negatives.count(name) for name in set(negatives)} == {"u0": 4000, "u1": 4000, "u2": 4000}
    wide = [("b0", "b1", "b2")] * 4000 + [("u0", "u1", "u2", "u3", "u4", "z0", "z1", "z2")]
    counts = np.array([[asked(r) for r in build_pope(images(wide), "random")[1:24000:2]].count(w) for w in wide[-1]])
    # 12 000 draws over 8 names: 1500 each, standard deviation about 30
    assert np.abs(counts - 1500).max() < 150


def test_statistics_from_elsewhere_decide_the_negatives():
    lists = [("b0", "b1", "b2"), ("u0", "u1", "u2")]
    elsewhere = [("b0", "z9"), ("z9",), ("b0", "b1", "b2", "z8"), ("b0", "z8"), ("u0", "u1", "u2", "b0", "z7")]
    popular = build_pope(images(lists), "popular", statistics=elsewhere)
    assert [asked(r) for r in popular[1:6:2]] == ["z9", "z8", "u0"]
    adversarial = build_pope(images(lists), "adversarial", statistics=elsewhere)
    assert asked(adversarial[1]) == "z8"


def test_sample_is_drawn_once_for_all_splits():
    lists = [(f"b{k % 5}", f"u{k % 4}", f"o{k % 3}") for k in range(40)]
    chosen = [{r["image"] for r in build_pope(images(lists), split, sample=10, seed=4)} for split in SPLITS]
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 10
    assert chosen[0] != {r["image"] for r in build_pope(images(lists), "random", sample=10, seed=5)}
    with pytest.raises(DataError, match="41 images wanted, 40 of 40"):
        build_pope(images(lists), "random", sample=41)


def test_repeated_objects_count_once():
    assert Statistics.of([("b0", "b0", "b1"), ("b1",)]).popular == ("b1", "b0")


def test_articles_and_the_typo_of_the_first_release():
    assert question_text("cup") == question_text("cup", legacy_typo=True) == "Is there a cup in the image?"
    assert question_text("orange") == "Is there an orange in the image?"
    assert question_text("orange", legacy_typo=True) == "Is there an orange in the imange?"


def test_impossible_demands_are_errors():
    with pytest.raises(DataError, match="unknown split 'hard'"):
        build_pope(images([("b0", "b1", "b2")]), "hard")
    with pytest.raises(DataError, match=r"'0\.png' has no absent object"):
        build_pope(images([("b0", "b1", "b2")]), "random")
