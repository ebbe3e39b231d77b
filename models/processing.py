"""From chat turns to the batch of a pretrained model, through the checkpoint's own processor and chat template."""

import copy
import inspect
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerFast

from vlm.models.errors import ModelError
from vlm.models.program.layout import Side

# A conversation: (role, parts) for every turn; a part is text or an image.
Chat = Sequence[tuple[str, Sequence[str | Image.Image]]]
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


class Encoded(NamedTuple):
    """A conversation as the model sees it: an image's token stands as often as the image has visual tokens.

    weights[t]: the loss weight of predicting tokens[t]. types: the processor's ``token_type_ids`` where it gives some.
    media: its tensors about the images. ends: how many tokens there are when each turn ends.
    """

    tokens: list[int]
    weights: list[float]
    types: list[int] | None
    media: Mapping[str, Tensor]
    ends: list[int]


def load_processor(name: str | os.PathLike[str]) -> Any:
    """The processor of a folder or a hub name. Raises ModelError when there is none that takes images and text."""
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model: no processor at {str(name)!r}: {str(error).splitlines()[0]}") from None
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"model: the processor at {str(name)!r} takes no images; found {type(processor).__name__}")
    return processor


def process(processor: Any, chats: Sequence[Chat], *, side: Side = "left") -> Mapping[str, Any]:
    """The prompts of a batch of conversations as tensors, for ``PretrainedVlm.inputs``; an answer is to follow.

    With a chat template the checkpoint says how turns are written; without one their text follows as it stands, an
    image as the processor's placeholder. Raises ModelError when the processor refuses.
    """
    texts = [written(processor, chat, ask=True) for chat in chats]
    return _call(processor, texts, list(map(_images, chats)), padding=True, padding_side=side)


def encode(processor: Any, chat: Chat, weights: Sequence[float], stops: Sequence[int]) -> Encoded:
    """A conversation to learn from; ``weights[n]`` is the loss weight of turn n, 0 where it is not learned.

    What an assistant turn teaches runs from where a prompt would end to the first of the tokens ``stops``, that token
    among it. A template that ends answers with none of them (LLaVA-1.5's) gets the first one in place of the blank
    after the answer, or the model would never learn to stop.

    Raises ModelError when the processor or the template refuses, or when a template writes earlier turns otherwise
    once another follows, so that nobody can tell what the assistant said.
    """
    if "suffix" in inspect.signature(type(processor).__call__).parameters:
        return _encode_suffix(processor, chat, weights)
    script = _script(processor, chat, [processor.tokenizer.convert_ids_to_tokens(stop) for stop in stops])
    seen = _Seen(processor.tokenizer)
    own = copy.copy(processor)
    own.tokenizer = seen
    found = _call(own, [script.text], [_images(chat)])
    tokens = found["input_ids"][0].tolist()
    moved = _moved(script.text, seen.text, processor.image_token)
    spans = [(moved(a), moved(b), weights[turn]) for turn, a, b in script.answers]
    weighed = _weighed(tokens, seen.offsets, spans, stops)
    ends = [moved(end) for end in script.ends]
    starts = [start for start, _ in seen.offsets]
    return Encoded(tokens, weighed, _types(found), _media(found), [sum(s < end for s in starts) for end in ends])


class _Script(NamedTuple):
    """A whole conversation as text, with the turn, start and end of each answer and the end of every turn."""

    text: str
    answers: list[tuple[int, int, int]]
    ends: list[int]


def _script(processor: Any, chat: Chat, stops: Sequence[str]) -> _Script:
    whole = written(processor, chat, ask=False)
    text, done, answers, ends = "", 0, [], []
    for turn, (role, _) in enumerate(chat):
        after = written(processor, chat[: turn + 1], ask=False)
        before = written(processor, chat[:turn], ask=True) if role == "assistant" and turn else ""
        if not whole.startswith(after) or not after.startswith(before) or len(after) < done:
            raise ModelError(
                f"{type(processor).__name__}: expected a chat template that writes a turn the same whatever follows; "
                f"found one that changes turn {turn + 1}, so what the assistant says cannot be told apart"
            )
        start, piece = len(text) + max(len(before) - done, 0), after[done:]
        if role == "assistant" and not any(stop in after[len(before) :] for stop in stops):
            piece = piece.rstrip() + stops[0]
        text, done = text + piece, len(after)
        ends.append(len(text))
        if role == "assistant":
            answers.append((turn, start, len(text)))
    return _Script(text, answers, ends)


def _encode_suffix(processor: Any, chat: Chat, weights: Sequence[float]) -> Encoded:
    """For processors that take prompt and answer apart (PaliGemma: the prompt is read in both directions)."""
    if [role for role, _ in chat].count("assistant") != 1 or chat[-1][0] != "assistant":
        found = ", ".join(role for role, _ in chat)
        raise ModelError(f"{type(processor).__name__}: expected one question and its answer; found turns of {found}")
    prompt, answer = written(processor, chat[:-1], ask=True), written(processor, chat[-1:], ask=False)
    found = _call(processor, [prompt], [_images(chat)], suffix=[answer])
    tokens, types = found["input_ids"][0].tolist(), _types(found)
    assert types is not None  # such a processor says which tokens are the answer's
    return Encoded(tokens, [weights[-1] * kind for kind in types], types, _media(found), [len(tokens)] * len(chat))


class _Seen:
    """The tokenizer of a processor, with the text that it was last given and where each token stands in it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text, self.offsets = "", []
        if not isinstance(tokenizer, PreTrainedTokenizerFast) and not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"model.from: expected a fast tokenizer; found {type(tokenizer).__name__}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        found = self._tokenizer(text, **options, return_offsets_mapping=True)
        self.text = text if isinstance(text, str) else text[0]
        offsets = found.pop("offset_mapping")[0]
        self.offsets = [(int(start), int(end)) for start, end in offsets]
        return found


def _moved(written: str, expanded: str, mark: str) -> Callable[[int], int]:
    """From a place in the text as written to the same place once the processor has written out its images."""
    starts, shifts, at = [0], [0], 0
    pieces = written.split(mark)
    place = len(pieces[0])
    for number, piece in enumerate(pieces[1:], start=1):
        last = number == len(pieces) - 1
        at = len(expanded) - len(piece) if last else expanded.find(piece, at + len(pieces[number - 1]) + 1)
        place += len(mark)
        if at < 0 or not expanded.startswith(piece, at):
            raise ModelError("model.from: expected a processor that changes nothing but its images in a text")
        starts.append(place)
        shifts.append(at - place)
        place += len(piece)
    return lambda where: where + shifts[bisect_right(starts, where) - 1]


def _weighed(
    tokens: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int, float]],
    stops: Sequence[int],
) -> list[float]:
    """The weight of each token: that of the span its last character lies in, until the span's first stop token."""
    weights, over = [0.0] * len(tokens), set()
    for place, (token, (start, end)) in enumerate(zip(tokens, offsets, strict=True)):
        for number, (first, last, weight) in enumerate(spans):
            if end > start and first < end <= last and number not in over:
                weights[place] = weight
                if token in stops:
                    over.add(number)
    return [0.0, *weights[1:]]  # nothing comes before the first token, so nothing predicts it


def _types(found: Mapping[str, Any]) -> list[int] | None:
    return found["token_type_ids"][0].tolist() if "token_type_ids" in found else None


def _media(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if name not in PER_TOKEN and isinstance(value, Tensor)}


def _images(chat: Chat) -> list[Image.Image]:
    return [part for _, parts in chat for part in parts if not isinstance(part, str)]


def _call(processor: Any, texts: list[str], images: list[list[Image.Image]], **options: Any) -> Mapping[str, Any]:
    """The processor's answer as tensors. Raises ModelError with what it says."""
    begin = processor.tokenizer.bos_token
    if begin and texts[0].startswith(begin):  # a template may write what the tokenizer would add again
        options["add_special_tokens"] = False
    try:
        return processor(text=texts, images=images if any(images) else None, return_tensors="pt", **options)
    except (ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{type(processor).__name__}: cannot process these prompts: {reason}") from None


def written(processor: Any, chat: Chat, ask: bool) -> str:
    """A conversation as text; with ``ask`` it ends where an assistant would begin to speak."""
    if processor.chat_template is None:
        parts = [(part, " ") if isinstance(part, str) else (processor.image_token, "") for _, ps in chat for part in ps]
        return "".join(part + blank for part, blank in parts).removesuffix(" ")
    messages = [
        {
            "role": role,
            "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts],
        }
        for role, parts in chat
    ]
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise ModelError(f"{type(processor).__name__}: its chat template refuses these turns: {error}") from None
