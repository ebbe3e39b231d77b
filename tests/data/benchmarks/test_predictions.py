"""Answers of elsewhere: the forms a file may have, and every way in which it may be of something else."""

import json

import pytest

from vlm.data.benchmarks._shared.predictions import read_answers, score_file
from vlm.data.benchmarks.chair import Chair
from vlm.data.benchmarks.pope import Pope
from vlm.data.errors import DataError

ROWS = [
    {
        "question_id": k + 1,
        "image": f"{k // 2}.jpg",
        "text": f"Is there a thing {k} in the image?",
        "label": "ny"[k % 2],
    }
    for k in range(6)
]
ROWS = [{**row, "label": {"y": "yes", "n": "no"}[row["label"]]} for row in ROWS]
RIGHT = {str(row["question_id"]): row["label"].capitalize() for row in ROWS}


@pytest.fixture
def pope(tmp_path):
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return Pope([str(path)], "")


@pytest.fixture
def write(tmp_path):
    def to(content, lines: bool = True):
        path = tmp_path / ("answers.jsonl" if lines else "answers.json")
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
        return path

    return to


def records(**fields):
    return [{"question_id": int(k), "text": v, **fields} for k, v in RIGHT.items()]


QUOTED = [{"question": row["text"].lower(), "answer": RIGHT[str(row["question_id"])]} for row in ROWS]
LABELLED = [{**record, "label": row["label"].upper()} for record, row in zip(records(), ROWS, strict=True)]
FORMS = {
    "lines with text (LLaVA)": (records(prompt="q"), True),
    "array with answer": ([{"question_id": int(k), "answer": v} for k, v in RIGHT.items()], False),
    "array with full ids": ([{"id": f"random/{k}", "response": v} for k, v in RIGHT.items()], False),
    "object of answers": (RIGHT, False),
    "object of records": ({k: {"prediction": v, "answer": "not this"} for k, v in RIGHT.items()}, False),
    "no ids but questions (POPE)": (QUOTED, True),
    "own label, which agrees": (LABELLED, True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_scores_the_same(pope, write, form):
    found = score_file(pope, write(*FORMS[form]))
    assert found.scores["random"]["accuracy"] == 1.0
    assert (found.n, found.empty, found.missing_images) == (6, {}, None)
    assert found.protocol["random"]["n"] == 6


def test_names_of_fields_can_be_given(pope, write):
    path = write([{"key": k, "said": v} for k, v in RIGHT.items()])
    assert read_answers(pope, path, id_key="key", answer_key="said") == {f"random/{k}": v for k, v in RIGHT.items()}
    with pytest.raises(DataError, match="answer 1 lacks kye; found key, said"):
        read_answers(pope, path, id_key="kye", answer_key="said")


def test_empty_answers_are_scored_and_counted(pope, write):
    path = write(
        [{"question_id": int(k), "answer": None if k == "1" else " " if k == "2" else v} for k, v in RIGHT.items()]
    )
    found = score_file(pope, path)
    assert found.empty == {"random": 2}
    # the official parser takes an empty answer for a yes: right for question 2, wrong for question 1
    assert found.scores["random"]["accuracy"] == 5 / 6
    assert found.to_dict()["empty"] == {"random": 2}


def changed(change):
    listed = records()
    change(listed)
    return listed


BAD = {
    "missing": (lambda r: r.pop(2), r"1 of 6 questions have no answer: 'random/3'"),
    "repeated": (lambda r: r.append(r[0]), r"answer 7: '1' comes twice"),
    "reordered": (lambda r: r.reverse(), r"answer 1: expected 'random/1' in the order of the questions, found '6'"),
    "unknown": (lambda r: r[0].update(question_id=77), r"1 of 6 answers are of no question, the first is '77'"),
    "no words": (lambda r: r[1].update(text=["no"]), r"answer 2: expected an answer in words, found \['no'\]"),
    "true": (lambda r: r[1].update(text=True), r"answer 2: expected an answer in words, found True"),
    "no label": (lambda r: r[0].update(label="maybe"), r"answer 1: label 'maybe' is neither yes nor no"),
    "other label": (lambda r: r[0].update(label="yes"), r"answer 1: '1': expected the label 'no', found 'yes'"),
    "no answer": (lambda r: r[3].pop("text"), r"answer 4 lacks an answer; found question_id"),
    "two answers": (lambda r: r[0].update(answer="yes"), r"answer 1 has both answer and text"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_of_something_else_is_one_line(pope, write, what):
    change, message = BAD[what]
    with pytest.raises(DataError, match=message) as caught:
        score_file(pope, write(changed(change)))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("pope: ")


def test_order_counts_unless_told_otherwise(pope, write):
    path = write(changed(lambda r: r.reverse()))
    assert score_file(pope, path, any_order=True).scores["random"]["accuracy"] == 1.0


def test_answers_without_ids_must_repeat_their_questions(pope, write):
    given = [{"question": r["text"], "answer": "yes"} for r in ROWS]
    with pytest.raises(DataError, match="expected 6 answers without ids, found 5"):
        score_file(pope, write(given[:5]))
    given[2]["question"] = "Is there a thing 4 in the image?"
    with pytest.raises(DataError, match=r"answer 3: expected the question 'Is there a thing 2"):
        score_file(pope, write(given))
    with pytest.raises(DataError, match="expected an id in every record"):
        score_file(pope, write([{"answer": "yes"}] * 6))


def test_no_file_and_no_form(pope, tmp_path):
    with pytest.raises(DataError, match="pope: no file of answers"):
        score_file(pope, tmp_path / "nowhere.json")
    (tmp_path / "a.json").write_text("yes\nno\n")
    with pytest.raises(DataError, match="neither JSON lines nor a JSON array"):
        score_file(pope, tmp_path / "a.json")


def test_ids_that_two_splits_share_need_their_split(tmp_path, write):
    for split in ("random", "popular"):
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, ROWS)))
    both = Pope([str(tmp_path / f"coco_pope_{split}.json") for split in ("random", "popular")], "")
    with pytest.raises(DataError, match="answers are of no question, the first is '1'"):
        score_file(both, write(records()))
    full = [{"id": f"{split}/{k}", "answer": v} for split in ("random", "popular") for k, v in RIGHT.items()]
    assert score_file(both, write(full)).n == 12


def test_captions_by_the_number_of_their_image(tmp_path, write):
    images = {"COCO_val2014_000000000042.jpg": ["dog"], "COCO_val2014_000000000007.jpg": ["cat"]}
    (tmp_path / "truth.json").write_text(json.dumps(images))
    path = write([{"image_id": 42, "caption": "a dog"}, {"image_id": 7, "caption": "a dog"}])
    found = score_file(Chair(str(tmp_path / "truth.json"), ""), path)
    assert found.scores[""]["chair_s"] == 0.5


def test_missing_images_are_listed(tmp_path, write):
    (tmp_path / "images").mkdir()
    for name in ("0.jpg", "2.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "pope_random.json").write_text("\n".join(map(json.dumps, ROWS)))
    with_folder = Pope([str(tmp_path / "pope_random.json")], str(tmp_path / "images"))
    assert score_file(with_folder, write(records())).missing_images == ["1.jpg"]
    with pytest.raises(DataError, match="found no folder"):
        score_file(Pope([str(tmp_path / "pope_random.json")], "nowhere"), write(records()))
