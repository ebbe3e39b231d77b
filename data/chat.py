"""From chat messages to token ids, loss weights and image tensors.

The text between two images or special tokens is encoded in one piece, as the model's own tokenizer would see it, and
each token takes the weight of the characters it stands for. Special tokens and the image placeholder are put in by us
as ids; text can never produce one, whatever it spells.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from vlm.data.batch import Example
from vlm.data.decode import ImageLimits, decode_image
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.images import ImageTransform, joined
from vlm.data.schema import Message, Part, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Template:
    """How turns are written.

    `{bos}` and `{eos}` stand for the tokenizer's tokens; other special tokens are spelt as they are. What lies
    between `assistant_prefix` and the end of `assistant_suffix` is what the model says, hence what it learns; a prompt
    to answer ends with `assistant_prefix`. `system` is used where messages bring no system turn of their own.
    """

    name: str
    bos: str = "{bos}"
    system: str = ""
    system_prefix: str = ""
    system_suffix: str = "\n"
    user_prefix: str = ""
    user_suffix: str = "\n"
    assistant_prefix: str = ""
    assistant_space: str = ""
    assistant_suffix: str = "{eos}"
    image_suffix: str = ""


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = {
    "plain": Template("plain"),
    # LLaVA-1.5: the words and blanks of Vicuna v1.1, image first, then a new line
    "vicuna": Template(
        "vicuna",
        system=_VICUNA_SYSTEM,
        system_suffix=" ",
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        assistant_space=" ",
        image_suffix="\n",
    ),
}


@dataclass(frozen=True)
class _Piece:
    """Text, one token id, or the place of an image; with the weight of predicting it."""

    text: str = ""
    token: int | None = None
    ref: int = -1
    weight: float = 0.0


@dataclass(frozen=True)
class TokenView:
    """One token as people read it: its id, its name in the vocabulary, its text, its loss weight."""

    id: int
    name: str
    text: str
    weight: float
    is_image: bool


@dataclass
class ChatEncoder:
    """Makes examples of samples, and prompts of messages.

    Args:
        tokenizer: any fast tokenizer of transformers.
        template: how turns are written.
        image_id: the placeholder; its n-th occurrence stands for the n-th image.
        transform: from picture to tensor.
        max_tokens: longer chats are cut between turns, never inside one; None is no limit.
        drop_image: with this probability all images of a sample are left out, placeholders and all.
        image_tokens: what one image counts for against `max_tokens`.
        limits: which image sizes are accepted.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template: Template
    image_id: int
    transform: ImageTransform
    max_tokens: int | None = None
    drop_image: float = 0.0
    image_tokens: int = 1
    limits: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        special = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special = special
        unknown = special.get(str(self.tokenizer.unk_token))  # any strange word gives it, so it says nothing
        self._forbidden = {*special.values(), self.image_id} - {unknown}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        # A copy of our own: no cutting, no padding, and special tokens spelt in a text stay text.
        self._backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._template_pieces: dict[tuple[str, float], list[_Piece]] = {}  # few texts, asked for in every turn

    def __call__(self, sample: Sample, draw: Draw) -> Example:
        """Encode one sample. `draw.rng` decides on dropping images.

        Raises:
            DataError: not even the first exchange fits, a turn the template cannot write, text that spells a special
                token in a way the tokenizer cannot keep apart, or a bad image.
        """
        tokens, weights, refs = self.written(sample, draw)
        images = [self.transform.views(decode_image(sample.media[ref], sample.key, self.limits)) for ref in refs]
        pixels = joined([image.pixels for image in images]) if images else torch.zeros(0, 3, *self.transform.size)
        tiles = tuple(image.tiles for image in images if image.tiles is not None)
        return Example(sample.key, tokens, weights, pixels, sample.tags, draw.position, tiles)

    def written(self, sample: Sample, draw: Draw) -> tuple[list[int], list[float], list[int]]:
        """What calling it writes, without decoding an image: token ids, loss weights, and the media shown.

        Raises DataError as that does.
        """
        drop = self.drop_image > 0 and draw.rng.random() < self.drop_image
        return self._fit(sample, with_images=not drop)

    def prompt(self, messages: Sequence[Message] | Sequence[Part] | str) -> list[int]:
        """Token ids that end where the assistant begins to speak.

        Takes messages, or the parts or the text of a single user turn. Raises DataError as encoding a sample does.
        """
        turns = _as_messages(messages)
        if turns and turns[-1].role == "assistant":
            raise DataError("prompt: expected a last turn that asks, found one of the assistant")
        pieces = [piece for turn in self._turns("prompt", turns, True) for piece in turn]
        tokens, _, _ = self._encode("prompt", [*pieces, *self._written(self.template.assistant_prefix)])
        return tokens

    def view(self, example: Example) -> list[TokenView]:
        """The example token by token, for people."""
        return [self._seen(token, weight) for token, weight in zip(example.tokens, example.weights, strict=True)]

    def _seen(self, token: int, weight: float) -> TokenView:
        if token == self.image_id:  # no token of the vocabulary has to stand for it
            return TokenView(token, "<image>", "<image>", weight, True)
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        return TokenView(token, name, str(self.tokenizer.decode([token])), weight, False)

    def _fit(self, sample: Sample, with_images: bool) -> tuple[list[int], list[float], list[int]]:
        """The longest run of whole exchanges that fits: tokens, weights, and the media shown."""
        turns = self._turns(sample.key, sample.messages, with_images)
        ends = [n for n, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
        shortest = 0
        for end in dict.fromkeys([len(turns), *reversed(ends)]):
            tokens, weights, refs = self._encode(sample.key, [piece for turn in turns[:end] for piece in turn])
            shortest = len(tokens) + (self.image_tokens - 1) * len(refs)
            if self.max_tokens is None or shortest <= self.max_tokens:
                return tokens, weights, refs
        raise DataError(
            f"sample {sample.key}: tokens: expected at most {self.max_tokens}, found {shortest} in the shortest cut"
            f" that ends between turns"
        )

    def _turns(self, key: str, messages: Sequence[Message], with_images: bool) -> list[list[_Piece]]:
        """The pieces of each message; what opens the chat belongs to the first."""
        opening = self._written(self.template.bos)
        if self.template.system and not (messages and messages[0].role == "system"):
            system = Message("system", (Part("text", self.template.system),))
            opening = [*opening, *self._turn(key, system, with_images)]
        turns = [self._turn(key, message, with_images) for message in messages]
        return [opening + turns[0], *turns[1:]] if turns else [opening]

    def _turn(self, key: str, message: Message, with_images: bool) -> list[_Piece]:
        if message.role not in ("system", "user", "assistant"):
            expected = f"system, user or assistant, all that template {self.template.name} writes"
            raise DataError(f"sample {key}: role: expected {expected}, found {message.role!r}")
        prefix = getattr(self.template, f"{message.role}_prefix")
        suffix = getattr(self.template, f"{message.role}_suffix")
        weight = message.weight if message.role == "assistant" and message.loss else 0.0
        space = [_Piece(self.template.assistant_space, weight=weight)] if message.role == "assistant" else []
        content = [piece for part in message.content for piece in self._part(part, weight, with_images)]
        return [*self._written(prefix), *space, *content, *self._written(suffix, weight)]

    def _part(self, part: Part, weight: float, with_images: bool) -> list[_Piece]:
        if part.type == "text":
            return [_Piece(part.text, weight=weight)]
        return [_Piece(ref=part.ref), *self._written(self.template.image_suffix)] if with_images else []

    def _written(self, text: str, weight: float = 0.0) -> list[_Piece]:
        """Text of the template: special tokens in it are meant."""
        if (text, weight) not in self._template_pieces:
            self._template_pieces[text, weight] = self._split_template(text, weight)
        return self._template_pieces[text, weight]

    def _split_template(self, text: str, weight: float) -> list[_Piece]:
        for mark, token in (("{bos}", self.tokenizer.bos_token), ("{eos}", self.tokenizer.eos_token)):
            text = text.replace(mark, str(token or ""))
        pieces = self._split.split(text) if self._special else [text]
        return [
            _Piece("" if piece in self._special else piece, self._special.get(piece), weight=weight)
            for piece in pieces
            if piece
        ]

    def _encode(self, key: str, pieces: Sequence[_Piece]) -> tuple[list[int], list[float], list[int]]:
        tokens: list[int] = []
        weights: list[float] = []
        run: list[_Piece] = []
        refs: list[int] = []
        for piece in pieces:
            if piece.token is None and piece.ref < 0:
                run.append(piece)
                continue
            self._encode_run(key, run, tokens, weights)
            run = []
            tokens.append(self.image_id if piece.token is None else piece.token)
            weights.append(piece.weight)
            refs += [piece.ref] if piece.ref >= 0 else []
        self._encode_run(key, run, tokens, weights)
        return tokens, [0.0, *weights[1:]], refs  # nothing comes before the first token, so nothing predicts it

    def _encode_run(self, key: str, run: Sequence[_Piece], tokens: list[int], weights: list[float]) -> None:
        text = "".join(piece.text for piece in run)
        if not text:
            return
        encoded = self._backend.encode(text, add_special_tokens=False)
        if smuggled := self._forbidden.intersection(encoded.ids):
            name = self.tokenizer.convert_ids_to_tokens(smuggled.pop())
            raise DataError(f"sample {key}: text: expected no special token, found {name!r} spelt out in it")
        by_character = [piece.weight for piece in run for _ in piece.text]
        tokens += encoded.ids
        weights += [by_character[max(start, end - 1)] for start, end in encoded.offsets]


def _as_messages(given: Sequence[Message] | Sequence[Part] | str) -> list[Message]:
    if isinstance(given, str):
        return [Message("user", (Part("text", given),))]
    messages = [item for item in given if isinstance(item, Message)]
    parts = tuple(item for item in given if isinstance(item, Part))
    return messages or [Message("user", parts)]
