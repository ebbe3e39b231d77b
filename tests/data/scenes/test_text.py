"""Sentences against the scenes they are about, read back by CHAIR's matcher: the exact-truth check."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm.data.benchmarks._shared.objects import Vocabulary
from vlm.data.benchmarks._shared.words import singularise
from vlm.data.scenes import text
from vlm.data.scenes.classes import CLASSES
from vlm.data.scenes.world import World, generator

WORDS = Vocabulary.parse(text.synonyms_file(), "synonyms.txt")
SCENES = [World().draw(generator(11, "test", index), "test") for index in range(200)]
TOKENIZER = text.tokenizer()
seeds = st.integers(0, 2**32)


def named(sentence: str) -> list[str]:
    return [mention.object for mention in WORDS.mentions(sentence)]


@given(st.sampled_from(SCENES), seeds)
def test_full_caption_names_exactly_what_is_there(scene, seed):
    exchange = text.caption(scene, np.random.default_rng(seed))
    assert sorted(named(exchange.answer)) == sorted(scene.names)
    assert exchange.prompt == "Please describe this image in detail."


@given(st.sampled_from(SCENES), seeds)
def test_chair_reads_a_decoded_caption_like_the_written_one(scene, seed):
    answer = text.caption(scene, np.random.default_rng(seed)).answer
    decoded = TOKENIZER.decode(TOKENIZER.encode(answer).ids)
    assert decoded == answer.replace(".", " .")
    assert named(decoded) == named(answer)


@given(st.sampled_from(SCENES), seeds)
def test_brief_caption_names_two_that_are_there(scene, seed):
    found = named(text.caption(scene, np.random.default_rng(seed), full=False).answer)
    assert len(found) == len(set(found)) == 2
    assert set(found) <= set(scene.names)


@given(st.sampled_from(SCENES), seeds)
def test_answers_to_questions_are_true_and_nothing_is_asked_twice(scene, seed):
    exchanges = text.questions(scene, np.random.default_rng(seed), 3)
    asked = [found for exchange in exchanges for found in named(exchange.prompt)]
    assert len(asked) == len(set(asked)) == 3
    for exchange, what in zip(exchanges, asked, strict=True):
        assert exchange.answer == ("yes" if what in scene.names else "no")
        article, first = exchange.prompt.removeprefix("Is there ").split()[:2]
        assert article == ("an" if first[0] in "aeiou" else "a")


def test_proportions_of_the_mix():
    rng = np.random.default_rng(0)
    chats = [text.chat(SCENES[k % len(SCENES)], rng) for k in range(8000)]
    exchanges = [exchange for chat in chats for exchange in chat]
    assert {len(chat) for chat in chats if chat[0].prompt.startswith("Is there")} == {3}
    full = sum(e.prompt == text.FULL_PROMPT for e in exchanges)
    brief = sum(e.prompt == text.BRIEF_PROMPT for e in exchanges)
    answers = [e.answer for e in exchanges if e.prompt.startswith("Is there")]
    # 60 % captions, 70 % of them full, half the answers yes; three standard errors are below .02 and .03
    assert abs((full + brief) / 8000 - 0.6) < 0.02
    assert abs(full / (full + brief) - 0.7) < 0.025
    assert abs(answers.count("yes") / len(answers) - 0.5) < 0.03


def test_a_tenth_of_the_mentions_are_synonyms():
    rng = np.random.default_rng(1)
    said = [text.mention(number % 24, rng).split(" ", 1)[1] for number in range(24 * 250)]
    synonyms = sum(word != CLASSES[number % 24].name for number, word in enumerate(said))
    assert abs(synonyms / len(said) - 0.1) < 0.013
    assert len(set(said)) == sum(1 + len(item.synonyms) for item in CLASSES)


def test_negatives_are_uniform_over_absent_classes():
    scene, rng = SCENES[0], np.random.default_rng(2)
    exchanges = [exchange for _ in range(6000) for exchange in text.questions(scene, rng)]
    asked = [named(e.prompt)[0] for e in exchanges if e.answer == "no"]
    counts = [asked.count(item.name) for item in CLASSES if item.name not in scene.names]
    expected = len(asked) / len(counts)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts)


def test_classes_can_be_told_apart_in_text():
    assert len(WORDS.nodes) == sum(1 + len(item.synonyms) for item in CLASSES)
    assert sum(" " in item.name for item in CLASSES) == 3
    for item in CLASSES:
        assert 1 <= len(item.synonyms) <= 3
        for word in (item.name, *item.synonyms):
            assert named(word) == [item.name]


def test_plurals_come_back_as_the_class():
    for item in CLASSES:
        assert " ".join(singularise(word) for word in item.plural.split()) == item.name
        assert named(f"there are three {item.plural}") == [item.name]


def test_tokenizer_knows_every_word_that_can_be_said():
    rng = np.random.default_rng(3)
    unknown = TOKENIZER.token_to_id(text.UNK)
    sentences = [s for k in range(3000) for e in text.chat(SCENES[k % 200], rng) for s in (e.prompt, e.answer)]
    assert not any(unknown in TOKENIZER.encode(sentence).ids for sentence in sentences)
    assert len(set(text.vocabulary())) == len(text.vocabulary()) == TOKENIZER.get_vocab_size()
    assert TOKENIZER.encode("a zebra").tokens == ["a", "<unk>"]


def test_transformers_loads_the_folder(tmp_path):
    text.save_tokenizer(tmp_path)
    for kind in (PreTrainedTokenizerFast, AutoTokenizer):
        loaded = kind.from_pretrained(tmp_path)
        names = loaded.pad_token, loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.image_token
        assert names == ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
        assert loaded.convert_tokens_to_ids(list(names)) == [0, 1, 2, 3, 4]
        ids = loaded("<image>Is there a Stop sign in the image?", add_special_tokens=False)["input_ids"]
        assert loaded.decode(ids, skip_special_tokens=True) == "is there a stop sign in the image ?"
        assert loaded.decode([*ids, loaded.eos_token_id]).startswith("<image> is there")
