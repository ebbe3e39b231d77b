"""TempCompass: the official rules case by case, scores by dimension and type, frames from folders, official files."""

import json

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.predictions import score_file
from vlm.data.benchmarks.tempcompass import Tempcompass, read_answer
from vlm.data.errors import DataError

CHOICE = "What is the man doing?\nA. dunking\nB. dribbling\nC. passing"
CAPTION = "Which fits?\nOption 1: The man is dribbling.\nOption 2: A man is dunking."
QUESTIONS = {
    "multi-choice": {
        "v1": {"action": [{"question": CHOICE, "answer": "B. dribbling"}] * 2},
        "v2": {"speed": [{"question": "How fast?\nA. slow\nB. fast", "answer": "A. slow"}]},
    },
    "yes_no": {
        "v1": {
            "action": [{"question": "Is he dunking?", "answer": "no"}],
            "order": [{"question": "?", "answer": "yes"}],
        }
    },
    "caption_matching": {"v1": {"action": [{"question": CAPTION, "answer": "Option 2: A man is dunking."}]}},
    "captioning": {"v1": {"action": [{"question": "Caption it:", "answer": "B. dribbling"}]}},
}
META = {
    "v1": {"eval_dim": {"action": {"subject": "man", "type": "fine-grained action"}, "speed": None}},
    "v2": {"eval_dim": {"speed": {"type": "absolute speed"}}},
}
ANSWERS = {
    "multi-choice/v1/action/1": "B",
    "multi-choice/v1/action/2": "I think he is dribbling",
    "multi-choice/v2/speed/1": "A. slow",
    "yes_no/v1/action/1": "No, he is not.",
    "yes_no/v1/order/1": "maybe",
    "caption_matching/v1/action/1": "Option 2",
}


@pytest.fixture
def build(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    for task, content in QUESTIONS.items():
        (folder / f"{task}.json").write_text(json.dumps(content))
    (tmp_path / "meta.json").write_text(json.dumps(META))

    def make(**options) -> Tempcompass:
        options = {"images": "", "meta": str(tmp_path / "meta.json"), **options}
        return Tempcompass(str(folder), **options)

    return make


@pytest.mark.parametrize(
    ("task", "text", "right"),
    [
        ("multi-choice", "B. dribbling", True), ("multi-choice", "B", True), ("multi-choice", "C", False),
        ("multi-choice", "B.", True), ("multi-choice", "B. whatever", True), ("multi-choice", "B) dribbling", True),
        ("multi-choice", "A) dribbling", False), ("multi-choice", "D.", False), ("multi-choice", "b", None),
        ("multi-choice", "dribbling", None), ("multi-choice", "", None), ("multi-choice", "B dribbling", None),
        ("multi-choice", " B</s>", True), ("multi-choice", "Because", None), ("multi-choice", "E.", None),
        ("yes_no", "No.", True), ("yes_no", "NOT at all", True), ("yes_no", "yes", False), ("yes_no", "Well, no", None),
        ("yes_no", "", None),
        ("caption_matching", "Option 2: A man is dunking.", True), ("caption_matching", "A man is dunking.", True),
        ("caption_matching", "Option 2", True), ("caption_matching", "2", True), ("caption_matching", "2.", True),
        ("caption_matching", "Option 1", False), ("caption_matching", "1", False),
        ("caption_matching", "B) A man is dunking.", True), ("caption_matching", "The man is dribbling.", False),
        ("caption_matching", "the second one", None), ("caption_matching", "", None),
        ("captioning", "B. dribbling", None),
    ],
)  # fmt: skip
def test_official_rules(task, text, right):
    answer = {"multi-choice": "B. dribbling", "yes_no": "no"}.get(task, "Option 2: A man is dunking.")
    question = CHOICE if task == "multi-choice" else CAPTION
    assert read_answer(task, text, question, answer) is right


def test_sentences_are_named_by_letter():
    question = "Which?\nSentence A: He sits.\nSentence B: He stands."
    for text, right in (("B", True), ("Sentence B", True), ("A", False), ("Sentence B.", True)):
        assert read_answer("caption_matching", text, question, "Sentence B: He stands.") is right


def test_scores_by_hand(build):
    scores = build().score(ANSWERS)
    choice = scores["multi-choice"]
    assert (choice["accuracy"], choice["match_rate"], choice["n"]) == (2 / 3, 2 / 3, 3)
    assert (choice["action"], choice["speed"]) == (1 / 2, 1.0)
    assert (choice["fine-grained action"], choice["absolute speed"]) == (1 / 2, 1.0)
    assert choice["ci"][0] < 2 / 3 < choice["ci"][1]
    assert (scores["yes_no"]["accuracy"], scores["yes_no"]["order"]) == (1 / 2, 0.0)  # order needs no entry in meta
    assert scores["caption_matching"]["accuracy"] == 1.0
    assert "fine-grained action" not in build(meta=None).score(ANSWERS)["multi-choice"]


def test_a_judge_reads_what_rules_cannot(build, tmp_path):
    path = tmp_path / "replies.jsonl"
    tasks = ["multi-choice", "captioning"]
    answers = {**ANSWERS, "captioning/v1/action/1": "A man dribbles a ball."}
    requests = build(tasks=tasks, judge=str(path)).judge_requests(answers)
    assert [request.id for request in requests] == ["multi-choice/v1/action/2", "captioning/v1/action/1"]
    assert "I think he is dribbling" in requests[0].prompt
    assert CHOICE in requests[1].prompt and "A man dribbles a ball." in requests[1].prompt

    def scored(*replies: str) -> list[float]:
        lines = [{"id": r.id, "reply": reply} for r, reply in zip(requests, replies, strict=True)]
        path.write_text("\n".join(map(json.dumps, lines)))
        scores = build(tasks=tasks, judge=str(path)).score(answers)
        return [scores["multi-choice"]["accuracy"], scores["captioning"]["accuracy"]]

    assert scored("Correct", "B. dribbling") == [1.0, 1.0]
    assert scored("Incorrect.", "A. dunking or B. dribbling") == [2 / 3, 0.0]
    assert scored("no idea", "none") == [2 / 3, 0.0]
    with pytest.raises(DataError, match="captioning: expected a judge"):
        build(tasks=tasks)


def test_frames_are_evenly_spaced_and_in_order(build, tmp_path):
    for video, count in (("v1", 12), ("v2", 2)):
        (tmp_path / "frames" / video).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "frames" / video / f"frame_{number}.jpg").write_bytes(b"")
    bench = build(images=str(tmp_path / "frames"), frames=4)
    assert isinstance(bench, Benchmark)
    images = {question.id.split("/")[1]: question.images for question in bench.ask()}
    assert images["v1"] == tuple(f"v1/frame_{k}.jpg" for k in (1, 4, 7, 10))
    assert images["v2"] == ("v2/frame_0.jpg", "v2/frame_1.jpg")  # no frame twice
    assert bench.ask()[0].prompt == CHOICE + "\nPlease directly give the best option:"
    assert "no video" in bench.protocol()["yes_no"]["frames"]
    for file in (tmp_path / "frames" / "v2").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="1 of 2 videos have no folder of frames: v2"):
        build(images=str(tmp_path / "frames")).ask()


def predictions(folder, answers, key="prediction"):
    folder.mkdir(exist_ok=True)
    for task in ("multi-choice", "yes_no", "caption_matching"):
        content = {
            video: {
                dim: [{**r, key: answers[f"{task}/{video}/{dim}/{n}"]} for n, r in enumerate(records, start=1)]
                for dim, records in dims.items()
            }
            for video, dims in QUESTIONS[task].items()
        }
        (folder / f"{task}.json").write_text(json.dumps(content))


def test_official_answer_files(build, tmp_path):
    predictions(tmp_path / "p", ANSWERS)
    assert score_file(build(), tmp_path / "p").scores == build().score(ANSWERS)
    single = score_file(build(tasks=["yes_no"]), tmp_path / "p" / "yes_no.json").scores
    assert single == {"yes_no": build().score(ANSWERS)["yes_no"]}
    predictions(tmp_path / "p", {**ANSWERS, "yes_no/v1/order/1": None}, key="response")
    found = score_file(build(), tmp_path / "p")
    assert found.empty == {"yes_no": 1}
    assert found.missing_images is None
    assert score_file(build(limit=1), tmp_path / "p").n == 5


def test_comparison_and_cards(build):
    change = build().compare(ANSWERS, {**ANSWERS, "yes_no/v1/order/1": "Yes"})
    assert change["yes_no"]["accuracy"]["difference"] == 0.5
    assert change["multi-choice"]["accuracy"]["difference"] == 0
    cards = build().protocol()
    assert [(task, card["n"]) for task, card in cards.items()] == [
        ("multi-choice", 3), ("yes_no", 2), ("caption_matching", 1),
    ]  # fmt: skip
    assert cards["yes_no"]["judge"] == "rules"


def test_bad_input_is_one_line(build, tmp_path):
    with pytest.raises(DataError, match=r"task 'yes-no'.*nearest: yes_no"):
        build(tasks=["yes-no"])
    with pytest.raises(DataError, match="frames: expected a positive number"):
        build(frames=0)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="v1: no type of 'action' in"):
        build().ask()
    (tmp_path / "questions" / "yes_no.json").write_text('{"v1": {"actoin": []}}')
    with pytest.raises(DataError, match=r"v1: dimension 'actoin'.*nearest: action"):
        build(tasks=["yes_no"], meta=None).ask()
    (tmp_path / "questions" / "yes_no.json").write_text('{"v1": []}')
    with pytest.raises(DataError, match="v1: expected an object of dimensions"):
        build(tasks=["yes_no"], meta=None).ask()
    with pytest.raises(DataError, match="expected a folder with multi-choice"):
        Tempcompass(str(tmp_path / "nowhere"), "").ask()
