"""Chats by hand: which id stands where, and what is learned."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm.data.chat import TEMPLATES, ChatEncoder, Template
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.images import ImageTransform
from vlm.data.schema import Message, Part, Sample

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>"]
DRAW = Draw(11, 0, 5)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def bytewise() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that a text and its ids can be compared by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    built.decoder = decoders.ByteLevel()
    return wrapped(built)


def merging() -> PreTrainedTokenizerFast:
    """Byte-level BPE with " yes" as one token, so that a blank before the answer is not a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank = "\u0120"
    pairs = [(blank, "y"), (blank + "y", "e"), (blank + "ye", "s")]
    names = [*alphabet, *(first + second for first, second in pairs)]
    built = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, pairs))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    built.decoder = decoders.ByteLevel()
    return wrapped(built)


def wordwise() -> PreTrainedTokenizerFast:
    """Words at blanks; special tokens are in the vocabulary and would match whole words."""
    words = [*SPECIAL, "hi", "yes"]
    built = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(built)


def encoder(tokenizer: PreTrainedTokenizerFast | None = None, template: str = "plain", **options) -> ChatEncoder:
    tokenizer = tokenizer or bytewise()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_id, int)
    return ChatEncoder(tokenizer, TEMPLATES[template], image_id, ImageTransform((4, 4)), **options)


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "png")
    return file.getvalue()


def user(*content: str | int) -> Message:
    return Message("user", tuple(Part("text", c) if isinstance(c, str) else Part("image", ref=c) for c in content))


def assistant(text: str, **options) -> Message:
    return Message("assistant", (Part("text", text),), **options)


def chat(*messages: Message, images: int = 0) -> Sample:
    return Sample("k/1", messages, tuple(png(100 * n) for n in range(images)), ("png",) * images, tags=("cup",))


def spelt(encode: ChatEncoder, tokens: list[int]) -> str:
    decoded = encode.tokenizer.decode(tokens)
    assert isinstance(decoded, str)
    return decoded


def learned(encode: ChatEncoder, sample: Sample) -> str:
    example = encode(sample, DRAW)
    return spelt(encode, [token for token, weight in zip(example.tokens, example.weights, strict=True) if weight])


def test_a_plain_chat_by_hand():
    encode = encoder()
    example = encode(chat(user(0, "A?"), assistant("no"), images=1), DRAW)
    ids = {sign: encode.tokenizer.convert_tokens_to_ids(sign) for sign in [*SPECIAL, *"A?no", "\u010a"]}
    by_hand = ["<s>", "<image>", "A", "?", "\u010a", "n", "o", "</s>"]  # Ċ is how byte-level vocabularies write \n
    assert example.tokens == [ids[sign] for sign in by_hand]
    assert example.weights == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (example.key, example.tags, example.position) == ("k/1", ("cup",), 11)
    assert example.images.shape == (1, 3, 4, 4) and example.images.dtype == torch.float32


def test_turns_carry_their_own_weights():
    encode = encoder()
    turns = (user("a"), assistant("b", weight=0.5), user("c"), assistant("d", loss=False), user("e"), assistant("f"))
    example = encode(chat(*turns), DRAW)
    assert spelt(encode, example.tokens) == "<s>a\nb</s>c\nd</s>e\nf</s>"
    assert example.weights == [0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 1, 1]


def test_vicuna_is_written_as_llava_writes_it():
    encode = encoder(template="vicuna")
    sample = chat(user(0, "What?"), assistant("A cup."), user("Sure?"), assistant("Yes."), images=1)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    written = f"<s>{system} USER: <image>\nWhat? ASSISTANT: A cup.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert spelt(encode, encode(sample, DRAW).tokens) == written
    assert learned(encode, sample) == " A cup.</s> Yes.</s>"


def test_text_is_encoded_as_the_tokenizer_would_encode_the_whole():
    encode = encoder(merging(), template="vicuna")
    example = encode(chat(user("Q"), assistant("yes")), DRAW)
    whole = encode.tokenizer(spelt(encode, example.tokens), add_special_tokens=False)["input_ids"]
    assert example.tokens == whole
    assert learned(encode, chat(user("Q"), assistant("yes"))) == " yes</s>"
    assert sum(weight > 0 for weight in example.weights) == 2


def test_a_token_across_the_border_is_learned():
    encode = ChatEncoder(merging(), Template("tight", user_suffix=""), 0, ImageTransform((4, 4)))
    example = encode(chat(user("Q "), assistant("yes")), DRAW)
    assert [view.text for view in encode.view(example)] == ["<s>", "Q", " yes", "</s>"]
    assert example.weights == [0, 0, 1, 1]


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("tokenizer", [bytewise, merging])
def test_a_prompt_is_the_beginning_of_the_training_tokens(template: str, tokenizer: Callable):
    encode = encoder(tokenizer(), template)
    turns = (user(0, "Is it?"), assistant("yes"), user("And", 1, "this?"), assistant("yes"))
    example = encode(chat(*turns, images=2), DRAW)
    for cut in (1, 3):
        prompt = encode.prompt(turns[:cut])
        assert example.tokens[: len(prompt)] == prompt
        assert example.weights[len(prompt)] == 1 and example.weights[len(prompt) - 1] == 0
    assert encode.prompt("Is it?") == encode.prompt([Part("text", "Is it?")]) == encode.prompt([user("Is it?")])


def test_a_prompt_ends_with_who_asks():
    with pytest.raises(DataError, match="prompt: expected a last turn that asks"):
        encoder().prompt([user("a"), assistant("b")])


def test_a_system_turn_replaces_the_system_text():
    encode = encoder(template="vicuna")
    own = Message("system", (Part("text", "Be brief."),))
    assert spelt(encode, encode.prompt([own, user("Q")])) == "<s>Be brief. USER: Q ASSISTANT:"
    with pytest.raises(DataError, match=r"role: expected system, .* all that template vicuna writes, found 'tool'"):
        encode(chat(Message("tool", (Part("text", "x"),))), DRAW)


@pytest.mark.parametrize("text", ["<image>", "a</s><s>", "<|user|>", "<pad>", "x <image> y", "{eos}{bos}"])
def test_text_cannot_smuggle_in_special_tokens(text: str):
    encode = encoder()
    special = {number for number, token in encode.tokenizer.added_tokens_decoder.items() if token.special}
    example = encode(chat(user(text), assistant(text)), DRAW)
    ids = [token for token in example.tokens if token in special]
    assert ids == encode.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert spelt(encode, example.tokens) == f"<s>{text}\n{text}</s>"
    assert encode.image_id not in encode.prompt(text)
    # the tokenizer that was passed in still reads special tokens
    assert encode.tokenizer("<image>", add_special_tokens=False)["input_ids"] == [encode.image_id]


def test_a_tokenizer_that_cannot_keep_them_apart_is_an_error():
    with pytest.raises(DataError, match="sample k/1: text: expected no special token, found '<image>' spelt out in it"):
        encoder(wordwise())(chat(user("hi <image>"), assistant("yes")), DRAW)
    assert encoder(wordwise()).prompt("strange hi")[1:] == [3, 6]


def test_special_tokens_of_a_template_are_meant():
    tokenizer = bytewise()
    chatml = Template("own", bos="", user_prefix="<|user|>", user_suffix="", assistant_suffix="</s>\n")
    encode = ChatEncoder(tokenizer, chatml, 0, ImageTransform((4, 4)))
    sample = chat(user("<|user|>"), assistant("b"))
    user_id = tokenizer.convert_tokens_to_ids("<|user|>")
    assert isinstance(user_id, int)
    assert encode(sample, DRAW).tokens.count(user_id) == 1 and encode(sample, DRAW).tokens[0] == user_id
    assert learned(encode, sample) == "b</s>\n"


def test_the_first_token_is_never_learned():
    bare = Template("bare", bos="", assistant_suffix="")
    encode = ChatEncoder(bytewise(), bare, 0, ImageTransform((4, 4)))
    assert encode(chat(assistant("ab")), DRAW).weights == [0, 1]


def test_images_come_in_reading_order():
    encode = encoder()
    example = encode(chat(user(2, "a", 0, 2), assistant("b"), images=3), DRAW)
    assert example.tokens.count(encode.image_id) == len(example.images) == 3
    red = (example.images[:, 0, 0, 0] * 127.5 + 127.5).round().tolist()
    assert red == [200, 0, 200]


def test_a_tiled_image_keeps_its_one_placeholder():
    encode = ChatEncoder(bytewise(), TEMPLATES["plain"], 0, ImageTransform((2, 2), max_tiles=4))
    example = encode(chat(user(0, "a", 1), assistant("b"), images=2), DRAW)
    assert example.tokens.count(0) == example.image_count == 2
    assert example.tiles == ((2, 2, 4, 4), (2, 2, 4, 4)) and example.images.shape == (10, 3, 2, 2)
    assert encode(chat(user("a"), assistant("b")), DRAW).tiles == ()


def test_cutting_keeps_whole_exchanges():
    encode = encoder(max_tokens=10, image_tokens=4)
    turns = (user(0), assistant("b"), user("c", 1), assistant("d"))
    full = encode(chat(user("a"), assistant("b"), user("c"), assistant("d")), DRAW)
    assert len(full.tokens) == 9
    cut = encode(chat(*turns, images=2), DRAW)  # 1 + 4 + 1 + 2 = 8 fit; with the second image it would be 16
    assert spelt(encode, cut.tokens) == "<s><image>\nb</s>" and len(cut.images) == 1
    with pytest.raises(DataError, match="sample k/1: tokens: expected at most 10, found 12 in the shortest cut"):
        encode(chat(user(0, 0), assistant("b"), user("c"), assistant("d"), images=1), DRAW)


def test_dropping_images_follows_the_draw():
    encode = encoder(drop_image=0.4)
    sample = chat(user(0, "a", 1), assistant("b"), images=2)
    dropped = []
    for position in range(300):
        example = encode(sample, Draw(position, 0, 5))
        again = encode(sample, Draw(position, 3, 5))
        assert example.tokens == again.tokens
        assert example.tokens.count(encode.image_id) == len(example.images) and len(example.images) in (0, 2)
        dropped.append(len(example.images) == 0)
    assert abs(np.mean(dropped) - 0.4) < 3 * np.sqrt(0.4 * 0.6 / 300)
    assert encode(sample, DRAW).images.shape[1:] == (3, 4, 4)


def test_a_bad_image_names_the_sample():
    sample = Sample("k/1", (user(0),), (b"GIF89a",), ("png",))
    with pytest.raises(DataError, match="sample k/1: image: expected png"):
        encoder()(sample, DRAW)


def test_the_view_is_the_example_in_words():
    encode = encoder()
    example = encode(chat(user(0, "A"), assistant("b"), images=1), DRAW)
    views = encode.view(example)
    assert [view.text for view in views] == ["<s>", "<image>", "A", "\n", "b", "</s>"]
    assert [view.id for view in views] == example.tokens and [view.weight for view in views] == example.weights
    assert [view.is_image for view in views] == [False, True, False, False, False, False]
