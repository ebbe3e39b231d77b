"""Prompts with one image, several or none: what becomes of them, and that company in a batch changes no answer."""

import io
from pathlib import Path

import pytest
from PIL import Image

from vlm.build import build_encoder, build_model, build_tokenizer
from vlm.data.benchmarks._shared.contract import IMAGE_MARK
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.splice import IMAGE_TOKEN
from vlm.recipe import load_recipe


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((48, 48), 10 * grey).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def asker(recipe: Path) -> Asker:
    loaded = load_recipe(recipe)
    tokenizer = build_tokenizer(loaded)
    model = build_model(loaded, tokenizer).eval()
    images = {key: png(number) for number, key in enumerate("abc", start=3)}
    return Asker(model, tokenizer, build_encoder(loaded, model, tokenizer), images.__getitem__, 8)


PROMPTS = [
    Prompt("a", "what ?", 3),
    Prompt(("a",), "what ?", 3),
    Prompt(("a", "b"), "is there a cup ?", 3),
    Prompt((), "is there a cup ?", 3),
    Prompt(("c", "a", "b"), f"{IMAGE_MARK} is {IMAGE_MARK} there {IMAGE_MARK} ?", 3),
]


def test_images_stand_where_the_text_marks_them(asker: Asker):
    inputs = asker.inputs(PROMPTS)
    rows = zip(inputs.tokens, inputs.valid, strict=True)
    places = [[token == IMAGE_TOKEN for token in row[valid].tolist()] for row, valid in rows]
    assert [sum(row) for row in places] == [1, 1, 2, 0, 3]
    assert inputs.owner.tolist() == [0, 1, 2, 2, 4, 4, 4]
    first = places[2].index(True)
    assert places[2][first : first + 2] == [True, True]  # without marks they come one after the other, before the text
    marked = [place for place, image in enumerate(places[4]) if image]
    assert marked[1] - marked[0] == marked[2] - marked[1] == 2  # a word between
    assert (inputs.images[0] == inputs.images[1]).all() and (inputs.images[5] == inputs.images[0]).all()  # c, a, b


def test_one_key_is_one_image_however_it_is_given(asker: Asker):
    answers = asker(PROMPTS[:2], lambda count: None)
    assert answers[PROMPTS[0]] == answers[PROMPTS[1]]


def test_company_in_a_batch_changes_no_answer(asker: Asker):
    together = asker(PROMPTS, lambda count: None)
    asker.batch = 1
    assert asker(PROMPTS, lambda count: None) == together
    assert set(together) == set(PROMPTS)
