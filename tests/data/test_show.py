"""The page: what it shows is the example, and nothing in a sample can become markup."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm.data.chat import TEMPLATES, ChatEncoder
from vlm.data.draw import Draw
from vlm.data.images import ImageTransform
from vlm.data.schema import Message, Part, Sample
from vlm.data.show import show


def encoder() -> ChatEncoder:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<s>", "</s>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
    image_id = built.token_to_id("<image>")
    assert image_id is not None
    return ChatEncoder(tokenizer, TEMPLATES["plain"], image_id, ImageTransform((4, 4)))


class Page(HTMLParser):
    """The elements of a page, and the text of those with a class."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.tokens: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values["src"] or "")
        if tag == "span" and "title" in values:
            self._open = [values["class"] or ""]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.tokens.append((self._open.pop(), data))


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(file, "png")
    return file.getvalue()


def test_tokens_are_shown_as_they_are_learned():
    messages = (Message("user", (Part("image", ref=0), Part("text", "a"))), Message("assistant", (Part("text", "bc"),)))
    sample = Sample("k", messages, (png(),), ("png",))
    encode = encoder()
    page = Page(show([(sample, encode(sample, Draw(0, 0, 0)))], encode))
    assert page.tokens == [
        *(("given", "<s>"), ("chip", "image"), ("given", "a"), ("given", "\u21b5\n")),
        *(("learn", "b"), ("learn", "c"), ("learn", "</s>")),
    ]
    (source,) = page.images
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == png()


def test_nothing_in_a_sample_becomes_markup():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    sample = Sample("k", (Message("user", (Part("text", evil),)),), tags=(evil,), source=evil, license=evil)
    encode = encoder()
    html = show([(sample, encode(sample, Draw(0, 0, 0)))], encode, title=evil)
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags
    assert "default-src 'none'" in html and "<script" not in html
