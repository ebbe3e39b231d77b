"""Samples for a model that came whole from Hugging Face: through the checkpoint's own processor and chat template.

What :mod:`vlm.data.chat` is for composed models. Here the processor says how many tokens an image becomes, so an
example has an image's token as often as the image has visual tokens.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from vlm.data.batch import Batch, Example
from vlm.data.chat import Template, TokenView
from vlm.data.decode import ImageLimits, decode_image
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.schema import Message, Sample
from vlm.models.errors import ModelError
from vlm.models.pretrained import PretrainedInputs
from vlm.models.processing import Chat, Encoded, encode, process, written


@dataclass
class ProcessedExample(Example):
    """A sample as its processor made it; ``images`` only says how many there are. types, media: see
    :class:`~vlm.models.processing.Encoded`."""

    types: list[int] | None = None
    media: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class ProcessedBatch(Batch):
    """Examples side by side, right-padded; ``visual`` marks the places of images, ``media`` are the processor's tensors
    of all images in order."""

    visual: Bool[Tensor, "batch tokens"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    types: Int[Tensor, "batch tokens"] | None = None
    media: Mapping[str, Tensor] = field(default_factory=dict)

    def inputs(self) -> PretrainedInputs:
        """The part of the batch that the model sees."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        valid = place < self.length[:, None]
        return PretrainedInputs(self.tokens, valid, self.visual, self.media, self.types, self.keys, self.pack)


def stop_tokens(name: str, processor: Any) -> tuple[int, ...]:
    """The tokens that end an answer, that of the chat template first.

    A checkpoint may name several (Gemma 3: the end of a text and of a turn); the one to expect is what the template
    writes after an answer, or the tokenizer's end of text where it writes none.
    """
    tokenizer = processor.tokenizer
    try:
        found = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        found = None  # a checkpoint need not have one
    named = found if isinstance(found, list) else [found]
    given = [stop for stop in dict.fromkeys([tokenizer.eos_token_id, *named]) if isinstance(stop, int)]
    stops = [stop for stop in given if tokenizer.convert_ids_to_tokens(stop) is not None]  # of this vocabulary
    if not stops:
        raise ModelError(f"model.from: {name!r} has no end-of-text token, so answers could not end")
    if processor.chat_template is None:
        return tuple(stops)
    turns: Chat = [("user", ["a"]), ("assistant", ["a"])]
    answer = written(processor, turns, ask=False).removeprefix(written(processor, turns[:1], ask=True))
    places = {stop: answer.find(tokenizer.convert_ids_to_tokens(stop)) for stop in stops}
    return tuple(sorted(stops, key=lambda stop: (places[stop] < 0, places[stop])))


class ProcessorEncoder:
    """Makes examples of samples, and batches of questions.

    Args:
        processor: of the checkpoint.
        image_id: the token that stands for a visual token.
        stops: tokens that end an answer; see :func:`stop_tokens`.
        max_tokens: longer chats are cut between turns, never inside one or inside an image; None is no limit.
        drop_image: with this probability all images of a sample are left out.
    """

    def __init__(
        self,
        processor: Any,
        image_id: int,
        stops: Sequence[int],
        max_tokens: int | None = None,
        drop_image: float = 0.0,
    ) -> None:
        self.processor, self.image_id, self.stops = processor, image_id, tuple(stops)
        self.max_tokens, self.drop_image = max_tokens, drop_image
        self.limits = ImageLimits()
        self.template = Template(f"of the checkpoint's {type(processor).__name__}")
        tokenizer = processor.tokenizer
        special = {str(token) for token in tokenizer.all_special_tokens} | {str(processor.image_token)}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special -= {str(tokenizer.unk_token)}  # any strange word gives it, so it says nothing
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def __call__(self, sample: Sample, draw: Draw) -> ProcessedExample:
        """Encode one sample. ``draw.rng`` decides on dropping images.

        Raises:
            DataError: not even the first exchange fits, text that spells a special token, a bad image, or turns that
                the checkpoint's template or processor cannot write.
        """
        return self.with_images(sample, draw, lambda ref: decode_image(sample.media[ref], sample.key, self.limits))

    def with_images(self, sample: Sample, draw: Draw, picture: Callable[[int], Any]) -> ProcessedExample:
        """The same with ``picture(n)`` in place of the sample's n-th image. Raises DataError as a call does."""
        drop = self.drop_image > 0 and draw.rng.random() < self.drop_image
        chat = [(message.role, self._parts(sample, message, drop, picture)) for message in sample.messages]
        weights = [m.weight if m.role == "assistant" and m.loss else 0.0 for m in sample.messages]
        found, turns = self._fit(sample.key, chat, weights)
        count = sum(not isinstance(part, str) for _, parts in chat[:turns] for part in parts)
        return ProcessedExample(
            sample.key,
            found.tokens,
            found.weights,
            torch.zeros(count, 3, 0, 0),
            sample.tags,
            draw.position,
            types=found.types,
            media=found.media,
        )

    def ask(self, questions: Sequence[tuple[str, Sequence[bytes | str]]]) -> Mapping[str, Any]:
        """A batch of questions, each with a name for errors, its images and its text in order, for
        ``PretrainedVlm.inputs``."""
        chats: list[Chat] = []
        for key, parts in questions:
            shown = [self._plain(key, p) if isinstance(p, str) else decode_image(p, key, self.limits) for p in parts]
            chats.append([("user", shown)])
        return process(self.processor, chats, side="left")

    def view(self, example: Example) -> list[TokenView]:
        """The example token by token, for people."""
        return [self._seen(token, weight) for token, weight in zip(example.tokens, example.weights, strict=True)]

    def _seen(self, token: int, weight: float) -> TokenView:
        tokenizer = self.processor.tokenizer
        name = str(tokenizer.convert_ids_to_tokens(token))
        return TokenView(token, name, str(tokenizer.decode([token])), weight, token == self.image_id)

    def _parts(self, sample: Sample, message: Message, drop: bool, picture: Callable[[int], Any]) -> list[Any]:
        return [
            self._plain(sample.key, part.text) if part.type == "text" else picture(part.ref)
            for part in message.content
            if part.type == "text" or not drop
        ]

    def _plain(self, key: str, text: str) -> str:
        """The text itself when it spells no special token, which a processor would take for one."""
        if found := self._special.search(text):
            raise DataError(f"sample {key}: text: expected no special token, found {found[0]!r} spelt out in it")
        return text

    def _fit(self, key: str, chat: Chat, weights: Sequence[float]) -> tuple[Encoded, int]:
        """The longest run of whole exchanges that fits, and of how many turns it is."""
        found, turns = self._encoded(key, chat, weights), len(chat)
        most = self.max_tokens
        while most is not None and len(found.tokens) > most:
            answered = [n for n, (role, _) in enumerate(chat[: turns - 1], start=1) if role == "assistant"]
            if not answered:
                visual = sum(token == self.image_id for token in found.tokens)
                raise DataError(
                    f"sample {key}: tokens: expected at most {most}, found {len(found.tokens)}, {visual} of them an "
                    "image's, in the shortest cut that ends between turns"
                )
            # Images after the cut may have been counted, so what follows is an estimate; the loop makes sure.
            turns = max((n for n in answered if found.ends[n - 1] <= most), default=answered[0])
            found = self._encoded(key, chat[:turns], weights[:turns])
        return found, turns

    def _encoded(self, key: str, chat: Chat, weights: Sequence[float]) -> Encoded:
        try:
            return encode(self.processor, chat, weights, self.stops)
        except ModelError as error:
            raise DataError(f"sample {key}: {error}") from None


class CollateProcessed:
    """Pad and stack examples. Picklable, for the workers of the stream."""

    def __init__(self, pad_id: int, image_id: int) -> None:
        self.pad_id, self.image_id = pad_id, image_id

    def __call__(self, examples: Sequence[Example]) -> ProcessedBatch:
        """Examples without media (text alone, or a blank in place of an unreadable sample) go with the others."""
        rows = [torch.tensor(example.tokens) for example in examples]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        length = torch.tensor([len(row) for row in rows])
        valid = torch.arange(tokens.shape[1]) < length[:, None]
        processed = [example for example in examples if isinstance(example, ProcessedExample)]
        types = None
        if any(example.types is not None for example in processed):
            given = [torch.tensor(getattr(e, "types", None) or [0] * len(e.tokens)) for e in examples]
            types = pad_sequence(given, batch_first=True)
        owners = [row for row, example in enumerate(examples) for _ in range(example.image_count)]
        return ProcessedBatch(
            tokens=tokens,
            length=length,
            weights=pad_sequence([torch.tensor(example.weights) for example in examples], batch_first=True),
            images=torch.zeros(len(owners), 3, 0, 0),
            image_owner=torch.tensor(owners, dtype=torch.int64),
            keys=[example.key for example in examples],
            tags=[example.tags for example in examples],
            visual=(tokens == self.image_id) & valid,
            types=types,
            media=_join([example.media for example in processed if example.media]),
        )


def _join(media: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all samples one after the other; where their other dimensions differ, filled up with zeros."""
    return {name: _stack([one[name] for one in media]) for name in (media[0] if media else ())}


def _stack(values: Sequence[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        missing = [most - size for most, size in zip(largest, value.shape[1:], strict=True)]
        pads = [pad for gap in reversed(missing) for pad in (0, gap)]  # torch counts from the last dimension
        filled.append(torch.nn.functional.pad(value, pads))
    return torch.cat(filled)
