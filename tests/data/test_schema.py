"""chat-sample v1: what is read is what was written, and every deviation is named."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.data.errors import DataError
from vlm.data.schema import Message, Part, Sample, check_key, dump_sample, parse_sample


def png(width: int = 4, height: int = 3) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "png")
    return file.getvalue()


EXAMPLE = {
    "v": 1,
    "source": "toy-vqa",
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image", "ref": 0}, {"type": "image", "ref": 1}, {"type": "text", "text": "More?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The second."}], "weight": 1.0},
    ],
    "media": [{"w": 640, "h": 427}, {"w": 512, "h": 512}],
}
TWO = {0: ("jpg", b"a"), 1: ("jpg", b"b")}


def changed(**fields: Any) -> bytes:
    return json.dumps({**EXAMPLE, **fields}).encode()


def test_the_example_of_the_spec():
    sample = parse_sample("toy/1", json.dumps(EXAMPLE).encode(), TWO)
    user, assistant = sample.messages
    assert user == Message("user", (Part("image", ref=0), Part("image", ref=1), Part("text", "More?")))
    assert assistant == Message("assistant", (Part("text", "The second."),))
    assert sample.media == (b"a", b"b") and sample.media_ext == ("jpg", "jpg") and sample.source == "toy-vqa"
    assert [(info.width, info.height) for info in sample.media_info] == [(640, 427), (512, 512)]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
turns = st.lists(
    st.builds(
        Message,
        st.just("assistant"),
        st.lists(st.builds(lambda text: Part("text", text), texts), min_size=1, max_size=3).map(tuple),
        st.booleans(),
        st.floats(0, 10),
    ),
    min_size=1,
    max_size=3,
)


@given(turns, st.lists(texts, max_size=3), texts, st.one_of(st.none(), texts, st.booleans(), st.integers()))
def test_dump_and_parse_are_inverse(messages: list[Message], tags: list[str], text: str, answer: Any):
    user = Message("user", (Part("text", text), Part("image", ref=0)))
    sample = Sample(
        "k",
        (user, *messages),
        (png(),),
        ("png",),
        tags=tuple(tags),
        source=text,
        license="cc0",
        answer=answer,
        rejected=(messages[0],),
        meta={"objects": [{"cls": 1, "box": [0.5, 1]}], "none": None},
    )
    again = parse_sample("k", dump_sample(sample), {0: ("png", png())})
    (info,) = again.media_info
    assert (info.width, info.height, info.bytes) == (4, 3, len(png()))
    expected = {**vars(sample), "media_info": again.media_info, "answer": answer if answer != "" else None}
    assert vars(again) == expected


@pytest.mark.parametrize("key", ["a", "a/b-c_D9", "x" * 200])
def test_legal_keys(key: str):
    assert check_key(key) == key


@pytest.mark.parametrize(
    ("key", "found"),
    [
        *(("v1.5_2", "a dot"), ("../a", "a dot"), ("x" * 201, "201 characters")),
        *((key, "other") for key in ("", "/a", "a//b", "a/", "a b", "ä", "a\n", "a\\b")),
    ],
)
def test_illegal_keys(key: str, found: str):
    with pytest.raises(DataError, match=f"key: expected letters, digits, _ - /, found {found}"):
        check_key(key)


def turn(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": "x"}], **fields}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "json: expected utf-8, found byte 0xff at 0"),
        (b"{", "json: expected a json object, found"),
        (b"[]", r"json: expected a json object, found \[\]"),
        (b'{"v": 1, "v": 1}', "found field 'v' twice"),
        (b'{"v": NaN}', "found number NaN"),
        (b"[" * 100_000, "json: expected a json object"),
        (b'{"v": 1}', "messages: expected a value, found nothing"),
        (changed(v=2), "v: expected 1, found 2"),
        (changed(v=True), "v: expected 1, found True"),
        (changed(mesages=[]), r"mesages: expected one of v, messages, .*, found unknown field \(did you mean messages"),
        (changed(messages=[]), r"messages: expected a list of 1 or more messages, found \[\]"),
        (changed(messages=["hi"]), r"messages\[0\]: expected an object, found 'hi'"),
        (changed(messages=turn(role="bot")), r"messages\[0\].role: expected one of .*user.*, found 'bot'"),
        (
            changed(messages=turn(role="user", weight=1)),
            "expected loss and weight on assistant turns only",
        ),
        (changed(messages=turn(weight=-1)), r"messages\[0\].weight: expected a number of at least 0, found -1"),
        (changed(messages=turn(weight=True)), "weight: expected a number"),
        (changed(messages=turn(loss=1)), "loss: expected true or false, found 1"),
        (changed(messages=turn(content="hi")), "content: expected a list of parts, found 'hi'"),
        (changed(messages=turn(content=[])), "content: expected a list of parts"),
        (changed(messages=turn(content=[{"type": "video", "ref": 0}])), "expected a part of type text or image"),
        (changed(messages=turn(content=[{"type": "text", "text": 1}])), "text: expected a string, found 1"),
        (changed(messages=turn(content=[{"type": "text", "text": "\ud800"}])), "found half a surrogate pair"),
        (changed(messages=turn(content=[{"type": "image", "ref": -1}])), "ref: expected a number of at least 0"),
        (changed(rejected=[*turn(), {"role": "user", "content": []}]), r"rejected\[1\].role"),
        (changed(tags="cup"), "tags: expected a list, found 'cup'"),
        (changed(tags=[1]), r"tags\[0\]: expected a string"),
        (changed(meta=[]), "meta: expected an object"),
        (changed(answer=[1]), "answer: expected a string, a number"),
        (changed(media=[{"w": 1}]), "media: expected 2 entries, one per media member, found 1"),
        (changed(media=[{"bytes": 7}, {}]), r"media\[0\].bytes: expected 1, the size of the member, found 7"),
        (changed(messages=turn()), r"placeholder count mismatch: messages show media \[\], found media \[0, 1\]"),
    ],
)
def test_bad_json_is_named(content: bytes, message: str):
    with pytest.raises(DataError, match=message) as caught:
        parse_sample("some/key", content, TWO)
    assert "sample some/key: " in str(caught.value) and "\n" not in str(caught.value)


def test_a_reference_without_medium_is_a_placeholder_mismatch():
    with pytest.raises(DataError, match=r"some/key: placeholder count mismatch: .* \[0, 1\], found media \[0\]"):
        parse_sample("some/key", changed(media=[]), {0: ("jpg", b"a")})


def test_a_gap_in_the_media_is_named():
    with pytest.raises(DataError, match=r"media: expected numbers 0 to 1, found \[0, 2\]"):
        parse_sample("some/key", changed(), {0: ("jpg", b"a"), 2: ("jpg", b"b")})


def test_a_sample_that_could_not_be_read_back_is_not_written():
    good = Message("user", (Part("text", "hi"),))
    for sample in (
        Sample("k", (good,), (png(),), ("png",)),
        Sample("k.1", (good,)),
        Sample("k", (good,), meta={"x": object()}),
        Sample("k", (good,), meta={"x": float("nan")}),
    ):
        with pytest.raises(DataError, match=r"sample '?k"):
            dump_sample(sample)
