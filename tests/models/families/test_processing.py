"""Chats through a checkpoint's processor, against Transformers' own way from messages to tensors."""

import pytest
import torch
from transformers import CLIPImageProcessor, LlavaProcessor

from vlm.models.errors import ModelError
from vlm.models.processing import load_processor, process

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} z{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = tiny.tokenizer("<image>")
    options = {"num_additional_image_tokens": 1, "chat_template": TEMPLATE}
    found = tmp_path_factory.mktemp("processor")
    LlavaProcessor(images, tokenizer, 8, "default", **options).save_pretrained(found)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_template_writes_the_turns(folder, tiny, side):
    picture = tiny.noise(0)
    chats = [[("user", ["a", picture, "b c"]), ("assistant", ["d"]), ("user", ["e"])], [("user", ["f"])]]
    messages = [
        [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
                ],
            }
            for role, parts in chat
        ]
        for chat in chats
    ]
    processor = load_processor(folder)
    options = {"padding": True, "padding_side": side, "return_tensors": "pt", "return_dict": True, "tokenize": True}
    expected = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    found = process(processor, chats, side=side)
    assert {*found} == {*expected} and all(torch.equal(found[name], expected[name]) for name in found)


def test_without_a_template_text_stands_as_it_is(folder, tiny):
    processor = load_processor(folder)
    processor.chat_template = None
    found = process(processor, [[("user", [tiny.noise(0), "a b"])]])
    words = processor.tokenizer.convert_ids_to_tokens(found["input_ids"][0])
    assert words == ["<image>"] * 16 + ["a", "b"]


def test_what_a_processor_refuses_is_one_line(folder):
    with pytest.raises(ModelError, match=r"^LlavaProcessor: cannot process these prompts: [^\n]+$"):
        process(load_processor(folder), [[("user", [3, "a"])]])  # type: ignore[list-item]


def test_no_processor(tmp_path):
    with pytest.raises(ModelError, match=r"^model: no processor at '.*': [^\n]*$"):
        load_processor(tmp_path)


def test_a_tokenizer_alone_is_no_processor(tiny, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no processor at|takes no images"):
        load_processor(tmp_path)
