"""Preference pairs that a trained model makes of its own answers: ``vlm data make-pairs``.

By default as in M3ID + DPO (CVPR 2024): the answer to prefer is decoded with M3ID, the one to avoid is what the model
says to the same prompt when it does not see the image. Any row of a comparison may give either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from pydantic import ValidationError

from vlm.build import build_encoder, build_model, build_tokenizer, decoder_of, for_evaluation, program_of
from vlm.create import create
from vlm.data.benchmarks._shared.contract import IMAGE_MARK
from vlm.data.errors import DataError
from vlm.data.index import Manifest, load_manifest
from vlm.data.schema import Message, Part, Sample
from vlm.data.store import Store
from vlm.data.write import write_shards
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.program.attach import attach
from vlm.models.program.decode import check_decoder
from vlm.progress import Progress
from vlm.recipe import Recipe, RecipeError
from vlm.recipe.load import read_words
from vlm.recipe.schema import Comparison
from vlm.training.weights import trained_weights

NO_IMAGE = "no-image"


class Side(NamedTuple):
    """How one answer of each pair is made: under the methods of a row, with the image or without it."""

    row: Comparison
    image: bool = True


def read_side(text: str, option: str) -> Side:
    """``no-image``, or a row as in ``evaluate.compare``: ``{mitigate: {use: m3id}}``; ``{}`` is the model alone.

    Raises RecipeError.
    """
    if text == NO_IMAGE:
        return Side(Comparison(), image=False)
    value: Any = read_words([f"{option}={text}"])[option]
    if not isinstance(value, dict):
        raise RecipeError(f"{option}: expected {NO_IMAGE} or a row such as {{mitigate: {{use: m3id}}}}; found {text}")
    try:
        row = Comparison.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{option}: {where}: {first['msg']}") from None
    for kind, methods in (("prune", [row.prune]), ("kv", [row.kv]), ("mitigate", row.mitigate)):
        for method in methods:
            if method is not None:
                create(kind, method, check_only=True)
    return Side(row)


class _Blind(Asker):
    """Asks without the images of its prompts."""

    def inputs(self, prompts: Sequence[Prompt]) -> Any:
        return super().inputs(prompts).without_images()


@dataclass
class Pairs:
    """What pairs are made of and by whom.

    Args:
        source: of the recipe's data, whose images and questions are taken.
        chosen, rejected: how the two answers are made.
        samples: how many of the source, drawn with ``seed``; None is all, in order.
        prompt: asked of every image in place of the sample's own first question.
        max_new_tokens: longer answers are cut there.
    """

    recipe: Recipe
    source: str
    chosen: Side
    rejected: Side
    samples: int | None = None
    seed: int = 0
    prompt: str | None = None
    max_new_tokens: int = 64
    equal: int = 0  # pairs left out because both answers are the same
    empty: int = 0  # or one of them is empty
    _weights: str = field(default="", init=False)

    def write(self, out: Path) -> Manifest:
        """Make the pairs and write them as shards, all or none of them. Raises what loading and asking a model do, and
        DataError when no pair is left."""
        recipe = self.recipe
        if self.source not in recipe.data.sources:
            known = ", ".join(recipe.data.sources)
            raise RecipeError(f"--source: expected one of the recipe's sources {known}; found {self.source}")
        store = Store(load_manifest(list(recipe.data.sources[self.source].shards)))
        tokenizer = build_tokenizer(recipe)
        model = build_model(recipe, tokenizer)
        weights = trained_weights(recipe, model)
        self._weights = weights.name
        model = for_evaluation(recipe, model)
        numbers = self._numbers(len(store))
        seen: dict[str, bytes] = {}
        decoder, encoder = decoder_of(recipe), build_encoder(recipe, model, tokenizer)
        answers: list[Callable[[list[Prompt]], dict[Prompt, str]]] = []
        for side in (self.chosen, self.rejected):
            program = program_of(side.row, model.facts)
            check_decoder(program, decoder)
            kind = Asker if side.image else _Blind
            asker = kind(model, tokenizer, encoder, seen.__getitem__, recipe.evaluate.batch, decoder)
            answers.append(_under(model, program, asker))
        return write_shards(self._made(store, numbers, seen, answers), out)

    def _numbers(self, count: int) -> list[int]:
        if self.samples is None or self.samples >= count:
            return list(range(count))
        return sorted(numpy.random.default_rng(self.seed).choice(count, self.samples, replace=False).tolist())

    def _made(
        self,
        store: Store,
        numbers: Sequence[int],
        seen: dict[str, bytes],
        answers: Sequence[Callable[[list[Prompt]], dict[Prompt, str]]],
    ) -> Iterator[Sample]:
        progress, size = Progress("make pairs", len(numbers)), self.recipe.evaluate.batch
        for first in range(0, len(numbers), size):
            samples = [store.read(number) for number in numbers[first : first + size]]
            asked = [self._prompt(sample, seen) for sample in samples]
            chosen, rejected = (answer([prompt for prompt, _ in asked]) for answer in answers)
            seen.clear()
            for sample, (prompt, question) in zip(samples, asked, strict=True):
                if pair := self._pair(sample, question, chosen[prompt], rejected[prompt]):
                    yield pair
            progress.update(min(first + size, len(numbers)))

    def _prompt(self, sample: Sample, seen: dict[str, bytes]) -> tuple[Prompt, Message]:
        """The first question of a sample, as it is asked and as it is written."""
        question = next((message for message in sample.messages if message.role == "user"), None)
        if question is None:
            raise DataError(f"sample {sample.key}: messages: expected a question, found none")
        shown = [part for part in question.content if part.type == "image"]
        if not shown:
            raise DataError(f"sample {sample.key}: messages: expected an image in the first question, found none")
        if self.prompt is not None:
            question = Message("user", (*shown, Part("text", self.prompt)))
        names = []
        for part in shown:
            names.append(f"{sample.key}#{part.ref}")
            seen[names[-1]] = sample.media[part.ref]
        leading = all(part.type == "image" for part in question.content[: len(shown)])
        text = "".join(part.text if part.type == "text" else "" if leading else IMAGE_MARK for part in question.content)
        return Prompt(tuple(names), text, self.max_new_tokens), question

    def _pair(self, sample: Sample, question: Message, chosen: str, rejected: str) -> Sample | None:
        if not chosen or not rejected:
            self.empty += 1
            return None
        if chosen == rejected:
            self.equal += 1
            return None
        refs = [part.ref for part in question.content if part.type == "image"]
        place = {ref: number for number, ref in enumerate(refs)}
        content = tuple(
            replace(part, ref=place[part.ref]) if part.type == "image" else part for part in question.content
        )
        made = {"weights": self._weights, "chosen": _named(self.chosen), "rejected": _named(self.rejected)}
        return Sample(
            key=sample.key,
            messages=(Message("user", content), Message("assistant", (Part("text", chosen),))),
            media=tuple(sample.media[ref] for ref in refs),
            media_ext=tuple(sample.media_ext[ref] for ref in refs),
            tags=sample.tags,
            source=sample.source,
            license=sample.license,
            rejected=(Message("assistant", (Part("text", rejected),)),),
            meta={**sample.meta, "pair": made},
        )


def _named(side: Side) -> str:
    return side.row.title if side.image else NO_IMAGE


def _under(model: Any, program: Any, asker: Asker) -> Callable[[list[Prompt]], dict[Prompt, str]]:
    def answer(prompts: list[Prompt]) -> dict[Prompt, str]:
        with attach(model, program):
            return asker(prompts, lambda count: None)

    return answer
