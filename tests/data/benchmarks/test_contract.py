"""What holds for every benchmark: the protocol, questions with any number of images, cards, options of a recipe."""

import hashlib
from dataclasses import dataclass, fields, is_dataclass

import pytest

import vlm.create
from vlm.create import names
from vlm.data.benchmarks._shared.contract import IMAGE_MARK, Benchmark, Question, answers_in_order, card_of
from vlm.data.errors import DataError


def test_one_image_several_or_none():
    one = Question("q", ("a.jpg",), "What?")
    assert (one.image, one.parts()) == ("a.jpg", (None, "What?"))
    assert Question("q", (), "What?").parts() == ("What?",)
    assert Question("q", ("a", "b"), "What?").parts() == (None, None, "What?")
    for images in ((), ("a", "b")):
        with pytest.raises(DataError, match=f"expected one image, found {len(images)}"):
            _ = Question("q", images, "What?").image


def test_marks_say_where_images_stand():
    between = Question("q", ("a", "b"), f"First {IMAGE_MARK}, then {IMAGE_MARK}?")
    assert between.parts() == ("First", None, ", then", None, "?")
    assert Question("q", ("a", "b"), f"{IMAGE_MARK} {IMAGE_MARK}\nWhat?").parts() == (None, None, "\nWhat?")


def test_a_wrong_question_is_one_line():
    with pytest.raises(DataError, match=r"images: expected a tuple of keys, found 'a\.jpg'"):
        Question("q", "a.jpg", "What?")
    with pytest.raises(DataError, match="expected 2 marks <image> in the prompt or none, found 1"):
        Question("q", ("a", "b"), f"{IMAGE_MARK} what?")


@pytest.mark.parametrize("name", names("benchmark"))
def test_every_benchmark_is_a_frozen_dataclass_of_its_file_name(name):
    cls = vlm.create._load("benchmark", name, None)
    assert is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls.__name__.lower() == name
    said = {"images"} if getattr(cls, "by_head", False) else {"images", "max_new_tokens"}  # a head says no words
    assert said <= {field.name for field in fields(cls)} and hasattr(cls, "max_new_tokens")
    for method in ("ask", "score", "compare", "protocol"):
        assert getattr(cls, method).__doc__, f"{name}.{method} does not say what it gives"
    documented = cls.__doc__.split("Attributes:")[1]
    assert [field.name for field in fields(cls) if f"{field.name}: " not in documented] == []


@dataclass(frozen=True)
class Toy:
    images: str = ""
    max_new_tokens: int = 4
    limit: int | None = 3
    source = verified = "here"

    def ask(self):
        return []

    def score(self, answers):
        return {}

    def compare(self, baseline, answers):
        return {}

    def protocol(self):
        return {}


def test_a_card_holds_what_a_number_depends_on(tmp_path):
    (tmp_path / "q.json").write_text("[]")
    assert isinstance(Toy(), Benchmark)
    assert card_of(Toy(), [tmp_path / "q.json"], 7, prompt="{}") == {
        "benchmark": "toy", "prompt": "{}", "max_new_tokens": 4, "limit": 3, "seed": None,
        "files": [{"name": "q.json", "sha256": hashlib.sha256(b"[]").hexdigest()}], "source": "here", "n": 7,
    }  # fmt: skip
    with pytest.raises(DataError, match="no file"):
        card_of(Toy(), [tmp_path / "r.json"], 7)


def test_answers_in_the_order_of_questions():
    assert answers_in_order(["b", "a"], {"a": "1", "b": "2", "c": "3"}, "toy") == ["2", "1"]
    with pytest.raises(DataError, match="toy: 1 of 2 questions have no answer, the first is 'b'"):
        answers_in_order(["a", "b"], {"a": "1"}, "toy")
