"""Ask a model a benchmark's questions, in batches, under a program."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count, groupby
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from vlm.build import pad_id
from vlm.data.batch import Example, collate
from vlm.data.benchmarks._shared.contract import in_order
from vlm.data.chat import ChatEncoder
from vlm.data.decode import decode_image
from vlm.data.images import Views, joined
from vlm.data.schema import Part
from vlm.models.pretrained import PretrainedInputs
from vlm.models.program.decode import Decoder, generate
from vlm.models.vision_language import Inputs
from vlm.processed import ProcessorEncoder
from vlm.training.loss import inputs_of
from vlm.training.ranks import rank_and_world, share

IMAGE_CACHE_BYTES = 256 * 2**20


class Prompt(NamedTuple):
    """A question as it is asked: which image (a key of ``read``; several or none as a tuple) and what text.

    Images stand where the text marks them, else before it (``vlm.data.benchmarks._shared.contract.in_order``).
    """

    image: str | tuple[str, ...]
    text: str
    max_new_tokens: int

    @property
    def images(self) -> tuple[str, ...]:
        return (self.image,) if isinstance(self.image, str) else self.image

    @property
    def name(self) -> str:
        """What errors call it."""
        return ", ".join(self.images) or self.text[:40]

    def parts(self) -> tuple[int | str, ...]:
        """Text and the numbers of images, in the order they are shown."""
        number = count()
        return tuple(next(number) if part is None else part for part in in_order(self.text, len(self.images)))


class Asker:
    """Turns prompts into answers.

    Args:
        read: bytes of an image by its key.
        encoder: of the recipe's model; it also makes the pixels.
        batch: prompts that are answered together.
        decoder: how tokens are chosen; None is greedily.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        encoder: ChatEncoder | ProcessorEncoder,
        read: Callable[[str], bytes],
        batch: int,
        decoder: Decoder | None = None,
    ) -> None:
        self.decoder = decoder
        self.model, self.tokenizer, self.encoder, self.read, self.batch = model, tokenizer, encoder, read, batch
        self._seen: OrderedDict[str, Views] = OrderedDict()
        self._bytes = 0
        model.closing = self._closing

    def _closing(self) -> list[int]:
        """The tokens with which prompts end whatever is asked: the template's after the question."""
        asked = self.inputs([Prompt((), text, 1) for text in ("What is that?", "Say more, please!")])
        pair = [row[valid].tolist() for row, valid in zip(asked.tokens, asked.valid, strict=True)]
        same = 0
        while same < min(map(len, pair)) and pair[0][-1 - same] == pair[1][-1 - same]:
            same += 1
        return pair[0][len(pair[0]) - same :]

    @property
    def stop(self) -> int:
        """The token that ends an answer."""
        if isinstance(self.encoder, ProcessorEncoder):
            return self.encoder.stops[0]
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)  # load_tokenizer refuses a tokenizer without one
        return end

    def inputs(self, prompts: Sequence[Prompt]) -> Inputs | PretrainedInputs:
        """The prompts as one batch."""
        device = next(self.model.parameters()).device
        if isinstance(self.encoder, ProcessorEncoder):
            batch = self.encoder.ask([(prompt.name, self._read(prompt)) for prompt in prompts])
            moved = {name: value.to(device) for name, value in batch.items()}
            return self.model.inputs(moved, [prompt.name for prompt in prompts])
        examples = []
        for prompt in prompts:
            shown = [Part("text", p) if isinstance(p, str) else Part("image", ref=p) for p in prompt.parts()]
            tokens = self.encoder.prompt(shown)
            seen = [self._image(key) for key in prompt.images]
            pixels = joined([image.pixels for image in seen]) if seen else torch.zeros(0, 3, 0, 0)
            tiles = tuple(image.tiles for image in seen if image.tiles is not None)
            examples.append(Example(prompt.name, tokens, [0.0] * len(tokens), pixels, (), 0, tiles))
        return inputs_of(collate(examples, pad_id(self.tokenizer)).to(device))

    def __call__(
        self, prompts: Sequence[Prompt], tick: Callable[[int], None], shared: bool = False
    ) -> dict[Prompt, str]:
        """The answer to each different prompt, ``tick(n)`` after every n prompts.

        shared: all ranks of a launch ask, and each answers every so many batches; the batches are those of one process,
        so the answers are too.
        """
        batches = self.batches(prompts)
        if not shared:
            return self._answers(batches, 0, 1, tick)
        rank, world = rank_and_world()
        parts = share(lambda: self._answers(batches, rank, world, tick))
        return {prompt: answer for part in parts for prompt, answer in part.items()}

    def _answers(
        self, batches: Sequence[Sequence[Prompt]], rank: int, world: int, tick: Callable[[int], None]
    ) -> dict[Prompt, str]:
        """Of every ``world`` batches that of number ``rank`` answered; ``tick`` counts all of them."""
        answers: dict[Prompt, str] = {}
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            if rank < len(turn):
                answers |= zip(turn[rank], self.answer(turn[rank]), strict=True)
            tick(sum(map(len, turn)))
        return answers

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """The different prompts in batches of one limit, rows of like length together: less padding."""
        order = sorted(set(prompts), key=lambda p: (p.max_new_tokens, len(p.images), len(p.text), p.text, p.images))
        limits = [list(group) for _, group in groupby(order, lambda prompt: prompt.max_new_tokens)]
        return [group[n : n + self.batch] for group in limits for n in range(0, len(group), self.batch)]

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers to one batch."""
        texts = self.tokenizer.batch_decode(self.generate(prompts), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens that answer each prompt of one batch, which have one limit."""
        found = generate(
            self.model,
            self.inputs(prompts),
            max_new_tokens=prompts[0].max_new_tokens,
            stop=self.stop,
            decoder=self.decoder,
            subset=lambda rows: self.inputs([prompts[row] for row in rows]),
        )
        others = self.encoder.stops[1:] if isinstance(self.encoder, ProcessorEncoder) else ()
        return [_until(tokens, others) for tokens in found]

    def _read(self, prompt: Prompt) -> list[bytes | str]:
        """Encoded images and text, in the order they are shown."""
        return [part if isinstance(part, str) else self.read(prompt.images[part]) for part in prompt.parts()]

    def _image(self, key: str) -> Views:
        assert isinstance(self.encoder, ChatEncoder)
        if key in self._seen:
            self._seen.move_to_end(key)
            return self._seen[key]
        views = self.encoder.transform.views(decode_image(self.read(key), key, self.encoder.limits))
        self._seen[key] = views
        self._bytes += views.pixels.nbytes
        while self._bytes > IMAGE_CACHE_BYTES:
            self._bytes -= self._seen.popitem(last=False)[1].pixels.nbytes
        return views


def _until(tokens: list[int], others: Sequence[int]) -> list[int]:
    """An answer up to the first of the rarer tokens that end one."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in others), len(tokens))]
