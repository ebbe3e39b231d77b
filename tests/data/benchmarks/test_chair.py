"""CHAIR on captions and counts worked out by hand, and on both forms of ground truth."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.objects import COCO_FILE, Vocabulary
from vlm.data.benchmarks.chair import Chair
from vlm.data.errors import DataError

COCO = Vocabulary.read("coco")
GOLDEN = "A baby dog sits on a toilet seat near two chairs and a hot dog."


def named(caption: str) -> list[str]:
    return [mention.object for mention in COCO.mentions(caption)]


@pytest.fixture
def chair(tmp_path):
    def build(truth: dict, **options) -> Chair:
        path = tmp_path / "truth.json"
        path.write_text(json.dumps(truth))
        return Chair(str(path), "images", **options)

    return build


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (GOLDEN, ["dog", "toilet", "chair", "hot dog"]),
        ("", []),
        ("Nothing to see here.", []),
        # plurals, regular and not
        ("People ride buses past men, women and children", ["person", "bus", "person", "person", "person"]),
        ("mice, knives, wine glasses and scissors", ["mouse", "knife", "wine glass", "scissors"]),
        ("skis and toothbrushes", ["skis", "toothbrush"]),
        # pairs
        ("a fire hydrant by a stop sign under traffic lights", ["fire hydrant", "stop sign", "traffic light"]),
        ("a motor bike, a cell phone and a mobile phone", ["motorcycle", "cell phone", "cell phone"]),
        ("an adult giraffe and baby cows", ["giraffe", "cow"]),
        ("a passenger jet over a passenger train", ["airplane", "train"]),
        ("a man with a bow tie", ["person", "tie"]),
        # a baby is a person unless it is the baby of an animal in the table
        ("a baby, a baby rabbit and a baby sheep", ["person", "person", "sheep"]),
        # pairs that only keep their words from being seen
        ("at home plate beside the train tracks", []),
        # greedy from the left: "hot dog" is taken, "dog house" is none
        ("a hot dog house", ["hot dog"]),
        # three words never match; stove and oven both do
        ("a stove top oven", ["oven", "oven"]),
        # seats beside a toilet are no chairs, a chair still is
        ("a toilet with its seat up, seats and a chair", ["toilet", "chair"]),
        ("a seat without the other thing", ["chair"]),
        # marks end a pair, a hyphen keeps one word
        ("a stop. Sign here", []),
        ("a hot, dog", ["dog"]),
        ("the dog's bowl", ["dog", "bowl"]),
        ("a dining table", ["dining table"]),
    ],
)
def test_mentions_of_a_caption(caption, expected):
    assert named(caption) == expected


@pytest.mark.parametrize(
    ("word", "category"),
    [
        ("table", "dining table"), ("desk", "dining table"), ("seat", "chair"), ("stool", "chair"), ("bow", "tie"),
        ("container", "bowl"), ("ball", "sports ball"), ("bike", "bicycle"), ("scooter", "motorcycle"),
        ("goat", "sheep"), ("ox", "cow"), ("bull", "cow"), ("purse", "handbag"), ("wallet", "handbag"),
        ("briefcase", "handbag"), ("luggage", "suitcase"), ("computer", "laptop"), ("notebook", "laptop"),
        ("phone", "cell phone"), ("stove", "oven"), ("freezer", "refrigerator"), ("jet", "airplane"),
        ("bagel", "donut"), ("burger", "sandwich"), ("sub", "sandwich"), ("panda", "bear"), ("monitor", "tv"),
        ("television", "tv"),
    ],
)  # fmt: skip
def test_traps_of_the_coco_vocabulary(word, category):
    assert named(f"one {word} here") == [category]


def test_our_coco_list_has_80_categories_that_all_match():
    assert len(COCO_FILE.read_text().splitlines()) == len(set(COCO.nodes.values())) == 80
    for word, category in COCO.nodes.items():
        assert set(named(word)) == {category}


def test_places_of_mentions_are_those_of_the_caption():
    found = [(m.text, GOLDEN[m.start : m.end]) for m in COCO.mentions(GOLDEN)]
    words = ["baby dog", "toilet seat", "chairs", "hot dog"]
    assert found == [(word, word) for word in words]
    assert [m.text for m in COCO.mentions("A DOG, a Stop  Sign")] == ["DOG", "Stop  Sign"]


def test_golden_caption_scores_two_of_four(chair):
    scores = chair({"a": ["dog", "chair"]}).score({"a": GOLDEN})[""]
    assert (scores["chair_s"], scores["chair_i"], scores["recall"]) == (1.0, 0.5, 1.0)
    assert scores["by_position"] == [0.0, 1.0, 0.0, 1.0]


TRUTH = {"a": ["dog", "cat"], "b": ["cup"], "c": ["person", "car", "bus"], "d": ["kite"]}
CAPTIONS = {
    "a": "a dog and a dog and a horse",  # 3 mentions, 1 wrong
    "b": "there is nothing",  # no mention: a clean caption
    "c": "a man in a truck with a truck",  # 3 mentions, 2 wrong
    "d": "a kite.",  # 1 mention
}


def test_metrics_by_hand(chair):
    scores = chair(TRUTH).score(CAPTIONS)[""]
    assert scores["chair_s"] == 2 / 4
    assert scores["chair_i"] == 3 / 7
    assert scores["recall"] == 3 / 7  # dog; nothing; person; kite over 2 + 1 + 3 + 1
    assert scores["precision"] == 3 / 5  # distinct: dog, horse; person, truck; kite
    assert scores["length"] == (8 + 3 + 8 + 2) / 4
    assert scores["by_position"] == [0 / 3, 1 / 2, 2 / 2]
    assert scores["by_position_n"] == [3, 2, 2]
    assert scores["n"] == 4
    assert scores["ci"][0] < 0.5 < scores["ci"][1]
    assert scores["ci_i"][0] <= 3 / 7 <= scores["ci_i"][1]
    assert scores["warnings"] == []


def test_captions_without_objects_are_clean(chair):
    scores = chair(TRUTH).score(dict.fromkeys(TRUTH, ""))[""]
    assert (scores["chair_s"], scores["chair_i"], scores["by_position"]) == (0.0, 0.0, [])
    assert [line.split()[0] for line in scores["warnings"]] == ["chair_i", "precision"]


def test_equal_length_is_the_score_of_cut_captions(chair):
    built = chair(TRUTH)
    curve = built.score_at(CAPTIONS, [0, 2, 5, 99])
    assert curve[0]["length"] == 0
    assert curve[2]["chair_s"] == 0.0
    assert curve[5]["chair_s"] == 1 / 4
    assert curve[99] == built.score(CAPTIONS)[""]


def test_comparison_is_paired_by_image(chair):
    built = chair(TRUTH)
    change = built.compare(CAPTIONS, {**CAPTIONS, "a": "a dog", "c": "a man"})[""]
    assert change["chair_s"]["difference"] == -0.5
    assert change["chair_i"]["difference"] == pytest.approx(-3 / 7)
    assert change["recall"]["difference"] == 0.0
    assert built.compare(CAPTIONS, CAPTIONS)[""]["chair_s"]["p"] == 1.0


def test_a_gain_that_comes_from_saying_less_is_gone_at_equal_length(chair):
    built = chair(TRUTH)
    short = {key: " ".join(text.split()[:3]) for key, text in CAPTIONS.items()}
    change = built.compare(CAPTIONS, short)[""]
    for name in ("chair_s_matched", "chair_i_matched", "recall_matched"):
        assert change[name]["difference"] == 0 and change[name]["ci"] == [0, 0]
    assert change["chair_s"]["difference"] == built.score(short)[""]["chair_s"] - built.score(CAPTIONS)[""]["chair_s"]
    back = built.compare(short, CAPTIONS)[""]
    assert back["chair_i_matched"]["difference"] == 0  # whichever of the two is the longer one


def test_marks_for_a_picture(chair):
    assert chair(TRUTH).truth_of("a") == {"dog", "cat"}
    assert chair(TRUTH).mentions("a", "A dog and horses") == [
        {"text": "dog", "start": 2, "end": 5, "object": "dog", "hallucinated": False},
        {"text": "horses", "start": 10, "end": 16, "object": "horse", "hallucinated": True},
    ]
    with pytest.raises(DataError, match="'z' is not in"):
        chair(TRUTH).mentions("z", "a dog")


def test_questions_and_limit(chair):
    built = chair(TRUTH)
    assert isinstance(built, Benchmark)
    assert [(q.id, q.image, q.group) for q in built.ask()] == [(k, k, "") for k in "abcd"]
    assert {q.prompt for q in built.ask()} == {"Please describe this image in detail."}
    wide = {f"{k:03d}": ["cup"] for k in range(200)}
    draws = [[q.id for q in chair(wide, limit=20, seed=seed).ask()] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] == sorted(draws[0])
    assert len(set(draws[0])) == 20
    assert draws[0] != draws[2]
    with pytest.raises(DataError, match=r"limit 5, but .* has 4 images"):
        chair(TRUTH, limit=5).ask()


def test_coco_truth_unites_instances_and_captions(tmp_path):
    images = [{"id": 7, "file_name": "COCO_7.jpg"}, {"id": 8, "file_name": "COCO_8.jpg"}]
    instances = {
        "images": images,
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 18}],
    }
    captions = {"images": images, "annotations": [{"image_id": 7, "caption": "Two men on a sofa with puppies"}]}
    paths = []
    for name, content in (("instances.json", instances), ("captions.json", captions)):
        (tmp_path / name).write_text(json.dumps(content))
        paths.append(str(tmp_path / name))
    built = Chair(paths, "val2014")
    answers = {"COCO_7.jpg": "a dog, a person and a couch", "COCO_8.jpg": "a dog"}
    scores = built.score(answers)[""]
    assert (scores["chair_s"], scores["chair_i"], scores["recall"]) == (0.5, 0.25, 1.0)
    assert [card["name"] for card in built.protocol()[""]["files"]] == [
        "instances.json",
        "captions.json",
        "coco_synonyms.txt",
    ]


def test_own_synonyms_decide(chair, tmp_path):
    (tmp_path / "words.txt").write_text("cup, mug\nstop sign, signpost\n")
    built = chair({"a": ["mug"]}, synonyms=str(tmp_path / "words.txt"))
    assert built.score({"a": "two cups, a dog and a stop sign"})[""]["chair_i"] == 0.5


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"a": ["dgo"]}, "unknown object 'dgo'; nearest: 'do"),
        ({"a": "dog"}, "expected a list of names"),
        ([1], "expected an object of images, found a list"),
        ({"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}, "image 3, which is not listed"),
        ({"images": [{"id": 3, "file_name": "f"}], "annotations": [{"image_id": 3}]}, "without caption"),
    ],
)
def test_bad_truth_is_one_line(chair, truth, message):
    with pytest.raises(DataError, match=message) as caught:
        chair(truth).ask()
    assert "\n" not in str(caught.value)


def test_bad_synonyms_are_one_line(chair, tmp_path):
    with pytest.raises(DataError, match="'mug' is listed under 'cup' and 'glass'"):
        Vocabulary.parse("cup, mug\nglass, mug\n", "words.txt")
    with pytest.raises(DataError, match="found none"):
        Vocabulary.parse("\n", "words.txt")
    with pytest.raises(DataError, match=r"no file 'nowhere\.txt'"):
        chair(TRUTH, synonyms="nowhere.txt").ask()


def test_missing_caption_is_an_error(chair):
    with pytest.raises(DataError, match="1 of 4 questions have no answer, the first is 'b'"):
        chair(TRUTH).score({k: v for k, v in CAPTIONS.items() if k != "b"})
