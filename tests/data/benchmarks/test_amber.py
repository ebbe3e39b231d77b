"""AMBER on a tiny world: descriptions judged by hand and against a restatement, yes-no questions, what can go wrong."""

import json
import random

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.nouns import known_nouns
from vlm.data.benchmarks._shared.plugins import PLUGINS
from vlm.data.benchmarks.amber import Amber
from vlm.data.errors import DataError

RELATIONS = {
    "dog": ["puppy"],
    "cat": ["kitten"],
    "tree": ["forest", "bush"],
    "forest": ["tree"],
    "car": ["vehicle", "truck"],
    "person": ["man", "woman"],
    "light": ["lamp"],
    "bench": [],
    "can": [],
}
TYPES = [
    ("discriminative-hallucination", "no"),
    ("discriminative-attribute-state", "yes"),
    ("discriminative-attribute-state", "no"),
    ("discriminative-attribute-number", "no"),
    ("discriminative-attribute-action", "yes"),
    ("discriminative-relation", "yes"),
    ("relation", "no"),
]
DESCRIBED = [
    {"truth": ["dog", "tree"], "hallu": ["cat", "car"]},
    {"truth": ["forest", "person"], "hallu": ["dog"]},
    {"truth": ["bench"], "hallu": []},
]


@pytest.fixture
def build(tmp_path):
    notes = [{"id": n, "type": "generative", **note} for n, note in enumerate(DESCRIBED, start=1)]
    notes += [{"id": n, "type": kind, "truth": truth} for n, (kind, truth) in enumerate(TYPES, start=len(notes) + 1)]

    def make(change=None, queries=None, **options) -> Amber:
        listed = json.loads(json.dumps(notes))
        if change:
            change(listed)
        ids = queries or [note["id"] for note in notes]
        asked = [{"id": n, "image": f"AMBER_{n}.jpg", "query": f"Query {n}?"} for n in ids]
        for name, content in (("q", asked), ("a", listed), ("r", RELATIONS)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        (tmp_path / "safe.txt").write_text("light\ncamera\n")
        files = [str(tmp_path / name) for name in ("q.json", "a.json", "r.json", "safe.txt")]
        return Amber(*files, "images", **options)

    return make


ANSWERS = {
    "1": "A puppy under a light near two cats.",  # puppy covers dog; light is safe; cat is a trap, and wrong
    "2": "Trees, and a man with a dog.",  # tree is associated with forest, man with person; dog is a trap, and wrong
    "3": "Nothing at all.",  # no noun: clean
    "4": "No",
    "5": "Yes",
    "6": "Yes",  # wrong
    "7": "No.",  # not exactly "No": wrong, and no answered No
    "8": "No",  # wrong
    "9": "Yes",
    "10": "No",
}


def test_descriptions_by_hand(build):
    scores = build().score(ANSWERS)["generative"]
    assert scores["chair"] == 2 / 6  # kept: puppy, light, cat; tree, man, dog
    assert scores["cover"] == 3 / 5  # dog; forest, person; of dog, tree, forest, person, bench
    assert scores["hal"] == 2 / 3
    assert scores["cog"] == 2 / 3  # cat, dog of cat, car, dog
    assert scores["n"] == 3
    assert scores["ci"][0] <= 2 / 6 <= scores["ci"][1]
    assert scores["ci_hal"][0] < 2 / 3 < scores["ci_hal"][1]


def test_questions_by_hand(build):
    scores = build().score(ANSWERS)
    assert {group: values["accuracy"] for group, values in scores.items() if "accuracy" in values} == {
        "existence": 1.0,
        "attribute": 1 / 4,
        "state": 1 / 2,
        "number": 0.0,
        "action": 0.0,
        "relation": 1.0,
        "discriminative": 4 / 7,
    }
    whole = scores["discriminative"]
    # the answer no: given three times (4, 8, 10), of them right 4 and 10; there are four questions with a no
    assert (whole["precision"], whole["recall"], whole["unknown"]) == (2 / 3, 2 / 4, 1)
    assert whole["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2 + 0.0001))
    assert scores["existence"]["f1"] == pytest.approx(2 / 2.001)
    assert scores[""]["amber"] == pytest.approx((1 - 2 / 6 + whole["f1"]) / 2)
    assert scores[""]["ci"][0] <= scores[""]["amber"] <= scores[""]["ci"][1]


def test_right_answers_score_one(build):
    amber = build()
    answers = {**dict.fromkeys(ANSWERS, ""), "1": "dog tree", "2": "forest person", "3": "bench"}
    answers |= {key: label.capitalize() for key, label in amber.labels().items()}
    scores = amber.score(answers)
    assert [scores["generative"][name] for name in ("chair", "cover", "hal", "cog")] == [0, 1, 0, 0]
    assert {v["accuracy"] for v in scores.values() if "accuracy" in v} == {1.0}


def restated(text: str, truth: list[str], hallu: list[str], alike) -> tuple[int, int, set[int], set[int]]:
    """(nouns, wrong, covered, hit) by the published rules, read off lists of candidate words."""
    vocabulary = set(RELATIONS) | {word for words in RELATIONS.values() for word in words}

    def candidates(words):
        return [(r, k) for k, w in enumerate(words) for r in RELATIONS.get(w, [])] + [
            (w, k) for k, w in enumerate(words)
        ]

    nouns = known_nouns(text, vocabulary)
    wrong, covered, hit = 0, set(), set()
    for noun in nouns:
        if noun in ("light", "camera"):
            continue
        exact = [k for w, k in candidates(truth) if w == noun]
        if exact:
            covered.add(exact[0])
            continue
        hit.update([k for w, k in candidates(hallu) if w == noun][:1])
        hit.update([k for w, k in candidates(hallu) if alike(w, noun) > 0.8][:1])
        near = [k for w, k in candidates(truth) if alike(w, noun) > 0.8]
        covered.update(near[:1])
        wrong += not near
    return len(nouns), wrong, covered, hit


@pytest.mark.parametrize("similarity", ["exact", "first_letter"])
def test_many_descriptions_against_a_restatement(build, similarity, monkeypatch):
    def first_letter(a: str, b: str) -> float:
        return float(a[0] == b[0])

    monkeypatch.setitem(PLUGINS["similarity"], "first_letter", first_letter)
    alike = first_letter if similarity == "first_letter" else lambda a, b: float(a == b)
    amber, rng = build(queries=[1, 2, 3], similarity=similarity), random.Random(0)
    words = sorted({*RELATIONS, *(word for related in RELATIONS.values() for word in related)} - {"can"})
    for _ in range(40):
        answers = {str(n): "a " + ", a ".join(rng.choices(words, k=rng.randint(1, 6))) for n in (1, 2, 3)}
        expected = [restated(answers[str(n)], d["truth"], d["hallu"], alike) for n, d in enumerate(DESCRIBED, start=1)]
        scores = amber.score(answers)["generative"]
        assert scores["chair"] == sum(e[1] for e in expected) / sum(e[0] for e in expected)
        assert scores["cover"] == sum(len(e[2]) for e in expected) / 5
        assert scores["hal"] == sum(e[1] > 0 for e in expected) / 3
        assert scores["cog"] == sum(len(e[3]) for e in expected) / 3


def test_word_vectors_bring_likeness_back(build, tmp_path):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("3 2\nbush 1 0\nbench 0.95 0.1\ncar 0 1\nunused x y\n")
    answers = {**ANSWERS, "3": "a bush and a car"}
    exact, like = build().score(answers)["generative"], build(similarity=str(vectors)).score(answers)["generative"]
    # the bush is like the bench there is; the car is like nothing
    assert like["chair"] == exact["chair"] - 1 / 8
    assert like["cover"] == exact["cover"] + 1 / 5


def test_first_mentioned_annotation_wins(build):
    def twice(notes):
        notes[0]["truth"] = ["tree", "forest", "dog", "dog"]

    scores = build(twice, queries=[1]).score({"1": "a tree, a dog"})["generative"]
    # "tree" is associated with forest, which is looked up before the words themselves; the second dog stays uncovered
    assert scores["cover"] == 2 / 4
    assert build(twice, queries=[1]).score({"1": "a tree, a bush, a dog"})["generative"]["cover"] == 3 / 4


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("Dogs, people and a man ride", ["dog", "person", "man"]),
        ("It can be seen that a can is there; two cans", ["can", "can"]),
        ("They light a lamp by the light", ["lamp", "light"]),
        ("", []),
    ],
)
def test_nouns_by_rule(text, nouns):
    vocabulary = {"dog", "person", "man", "can", "light", "lamp"}
    assert known_nouns(text, vocabulary) == nouns


def test_words_that_the_list_has_as_they_stand():
    assert known_nouns("Slippers, sunglasses, people on TVs", {"slippers", "sunglasses", "people", "person", "TV"}) == [
        "slippers", "sunglasses", "people", "TV",
    ]  # fmt: skip
    assert known_nouns("a hot dog", {"hot", "dog"}) == ["dog"]


def test_parts_are_scored_alone(build):
    assert set(build(queries=[1, 2]).score(ANSWERS)) == {"generative"}
    assert set(build(queries=[4, 9, 10]).score(ANSWERS)) == {"existence", "relation", "discriminative"}


def test_first_word_reads_what_exact_does_not(build):
    assert build(parser="first_word").score(ANSWERS)["number"]["accuracy"] == 1.0


def test_questions_and_cards(build):
    amber = build(limit=1)
    assert isinstance(amber, Benchmark)
    questions = amber.ask()
    # the first of every type; relation is one group of two types
    assert [(q.id, q.group) for q in questions] == [
        ("1", "generative"), ("4", "existence"), ("5", "state"), ("7", "number"), ("8", "action"), ("9", "relation"),
    ]  # fmt: skip
    assert (questions[0].images, questions[0].prompt) == (("AMBER_1.jpg",), "Query 1?")
    cards = build().protocol()
    assert (cards["generative"]["mode"], cards["generative"]["n"]) == ("AMBER-noW2V", 3)
    assert [len(cards[group]["files"]) for group in ("generative", "existence", "")] == [4, 2, 4]
    assert build().score(ANSWERS).keys() == cards.keys()
    assert cards["attribute"]["parser"] == "exact"


def test_comparison(build):
    better = {**ANSWERS, "1": "A puppy.", "6": "No"}
    change = build().compare(ANSWERS, better)
    assert change["generative"]["chair"]["difference"] == pytest.approx(1 / 4 - 2 / 6)
    assert change["generative"]["hal"]["difference"] == pytest.approx(-1 / 3)
    assert change["state"]["accuracy"]["difference"] == 0.5
    assert change["relation"]["accuracy"] == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0}


def _type(notes):
    notes[3]["type"] = "discriminative-hallucinatio"


def _label(notes):
    notes[3]["truth"] = "maybe"


def _order(notes):
    notes[0], notes[1] = notes[1], notes[0]


def _words(notes):
    notes[0]["hallu"] = "dog"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_type, "annotation 4: type .*nearest: discriminative-hallucination"),
        (_label, "annotation 4: label 'maybe' is neither yes nor no"),
        (_order, "annotation 1: expected the id 1 at this place, found 2"),
        (_words, "annotation 1: hallu: expected a list of words"),
    ],
)
def test_bad_annotations_are_one_line(build, change, message):
    with pytest.raises(DataError, match=message) as caught:
        build(change).ask()
    assert "\n" not in str(caught.value)


def test_bad_queries_and_options(build):
    with pytest.raises(DataError, match="expected a number from 1 to 10, found 11"):
        build(queries=[11]).ask()
    with pytest.raises(DataError, match="'1' comes twice"):
        build(queries=[1, 1]).ask()
    with pytest.raises(DataError, match=r"parser 'exct'.*nearest: exact"):
        build(parser="exct")
    with pytest.raises(DataError, match=r"similarity 'exat'.*nearest: exact"):
        build(similarity="exat").score(ANSWERS)
    with pytest.raises(DataError, match="1 of 10 questions have no answer, the first is '10'"):
        build().score({key: text for key, text in ANSWERS.items() if key != "10"})
