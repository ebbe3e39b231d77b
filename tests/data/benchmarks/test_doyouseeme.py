"""Do You See Me: answers taken out of words, and the files of both the original and our own maker."""

import pytest

from vlm.data.benchmarks._shared.contract import Benchmark
from vlm.data.benchmarks._shared.images import missing_images
from vlm.data.benchmarks.doyouseeme import Doyouseeme, read_count, read_letters, read_option
from vlm.data.doyouseeme.make import make
from vlm.data.errors import DataError

FILES = {
    "visual_spatial": 'filename,question,answer,sweep\n0.svg,How many?,2,"(3, 3, 1)"\n0.svg,And now?,0,"(3, 3, 1)"\n',
    "letter_disambiguation": 'filename,answer,sweep\n0.svg,TDK,"(1, 1, 0.04)"\n',
    "visual_closure": 'filename,answer,sweep\n7.png,3,"[0.1, 1, 1, 1]"\n',
}
IDS = ["visual_spatial/0/1", "visual_spatial/0/2", "letter_disambiguation/0/1", "visual_closure/7/1"]


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_info.csv").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2", "2"),
        ("In grid 1, from row 2: 0.", "0"),
        ("There are three.", "3"),
        ("007", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_counts(text, found):
    assert read_count(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Option <2>", "2"), ("option 3.", "3"), ("4", "4"), ("(1)", "1"), ("Option: 2, not option 1", "2"),
        ("5", None), ("1 or 3", None), ("the first", None), ("", None), ("12", None),
    ],
)  # fmt: skip
def test_options(text, found):
    assert read_option(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("T", "T"), ("TDK", "TDK"), ("T D K", "TDK"), ("tdk", "TDK"), ("tdk.", "TDK"), ("I see T, D and K", "TDK"),
        ("A and I", "AI"), ("There is a T in it", "T"), ("no letters here", None), ("", None),
    ],
)  # fmt: skip
def test_letters(text, found):
    assert read_letters(text) == found


def test_the_original_files(folder):
    bench = Doyouseeme(str(folder))
    assert isinstance(bench, Benchmark)
    questions = bench.ask()
    assert [q.id for q in questions] == IDS
    assert questions[0].images == ("visual_spatial/0.png",)  # listed as .svg, converted
    assert (questions[0].prompt, questions[1].group) == ("How many?", "visual_spatial")
    assert "letter(s)" in questions[2].prompt and "Option <" in questions[3].prompt


def test_scores_by_hand(folder):
    answers = dict(zip(IDS, ("2", "one", "T, D, K", "cannot say"), strict=True))
    scores = Doyouseeme(str(folder)).score(answers)
    assert {name: scores[name]["accuracy"] for name in FILES} == {
        "visual_spatial": 0.5, "letter_disambiguation": 1.0, "visual_closure": 0.0,
    }  # fmt: skip
    assert scores[""]["mean_accuracy"] == pytest.approx(0.5)
    assert scores[""]["ci"][0] <= 0.5 <= scores[""]["ci"][1]
    assert scores["visual_closure"]["unread"] == 1
    change = Doyouseeme(str(folder)).compare(answers, {**answers, IDS[3]: "Option 3"})
    assert change["visual_closure"]["accuracy"]["difference"] == 1


def test_cards_and_choice(folder):
    bench = Doyouseeme(str(folder), dimensions=["visual_spatial"], limit=1)
    assert [(name, card["n"]) for name, card in bench.protocol().items()] == [("", 1), ("visual_spatial", 1)]
    with pytest.raises(DataError, match=r"dimension 'visual_spacial'.*nearest: visual_spatial"):
        Doyouseeme(str(folder), dimensions=["visual_spacial"])
    with pytest.raises(DataError, match="no file"):
        Doyouseeme(str(folder), dimensions=["visual_form_constancy"]).ask()
    with pytest.raises(DataError, match="expected a folder per dimension"):
        Doyouseeme(str(folder / "nowhere")).ask()


def test_what_our_maker_draws_is_asked_and_answered(tmp_path):
    made = make(tmp_path / "made", seed=0, tasks=["visual_figure_ground", "letter_disambiguation"], repeats=1)
    bench = Doyouseeme(str(made))
    questions = bench.ask()
    assert len(questions) == 9 + 27
    assert missing_images(bench.images, questions) == []
    (made / "letter_disambiguation" / "3.png").unlink()
    assert missing_images(bench.images, questions) == ["letter_disambiguation/3.png"]
    with pytest.raises(DataError, match="36 of 36 questions have no answer"):
        bench.score({})
