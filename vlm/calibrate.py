"""Calibration: run what a method finds out about a model over samples of the recipe's data, and keep it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from vlm.build import artifact_path, build_collate, build_encoder, build_model, build_tokenizer, for_evaluation
from vlm.create import create
from vlm.data.benchmarks._shared.objects import Vocabulary
from vlm.data.draw import Draw
from vlm.data.index import load_manifest
from vlm.data.schema import Message, Sample
from vlm.data.store import Store
from vlm.evaluation.answer import Asker, Prompt
from vlm.models.program.artifact import AUTO, calibration_of, contents, fingerprint, write
from vlm.models.program.tune import Asked, Described, Judged
from vlm.progress import Progress
from vlm.recipe import Recipe, RecipeError
from vlm.training.loss import inputs_of
from vlm.training.weights import trained_weights

# How many samples are used where nobody says: prompts cost a pass for each head, answers are generated one by one.
SAMPLES = {"asked": 64, "described": 64, "judged": 512, "captioned": 2048}
CAPTION_WORDS = 3  # an answer with as many words describes
READ_AT_MOST = 50  # samples, for each one that is wanted and fits


def calibrate(recipe: Recipe, name: str | None = None, source: str | None = None, samples: int | None = None) -> list:
    """Calibrate the methods of the recipe that say ``auto`` (only ``name``, if given) on the first ``samples`` usable
    samples of a source (the first one, if not given). Returns the files, one for each, which are written anew.

    Raises RecipeError when nothing is to be calibrated or the source has not what a method asks for.
    """
    found = automatic(recipe, name)
    if not found:
        wanted = "no method" if name is None else f"no {name}"
        raise RecipeError(f"calibrate: expected a mitigator with calibration: auto; found {wanted} in the recipe")
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    trained_weights(recipe, model)
    model = for_evaluation(recipe, model)
    _make(found, Samples(recipe, model, tokenizer, source, samples))
    return list(found)


def calibrate_missing(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Calibrate what the recipe's ``auto`` stands for as far as it is not there for these weights yet."""
    own = fingerprint(model)
    found = {path: method for path, method in automatic(recipe).items() if not _is_of(path, own)}
    if found:
        _make(found, Samples(recipe, model, tokenizer))


def automatic(recipe: Recipe, name: str | None = None) -> dict[Path, tuple[str, Any]]:
    """The methods of the recipe that are calibrated for it, by the file that keeps what was found."""
    found: dict[Path, tuple[str, Any]] = {}
    for row in (recipe.own, *recipe.comparisons):
        for method in row.mitigate:
            made: Any = create("mitigate", method)
            option = calibration_of(made)
            if option is not None and option[1] == AUTO and name in (None, str(method.use)):
                found[artifact_path(recipe, str(method.use), made.settings)] = (str(method.use), made)
    return found


def _is_of(path: Path, own: str) -> bool:
    return path.is_file() and contents(path, path.name).about.get("weights") == own


def _make(found: Mapping[Path, tuple[str, Any]], samples: "Samples") -> None:
    own = fingerprint(samples.model)
    for path, (who, method) in found.items():
        tensors, more = method.calibrate(samples.model, samples, _ticking(f"calibrate {who}"))
        write(path, tensors, {"method": who, "weights": own, "settings": str(method.settings), **more})


def _ticking(title: str) -> Callable[[int, int], None]:
    """``tick(done, total)`` as progress on the terminal."""
    shown: list[Progress] = []

    def tick(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(title, total))
        shown[0].update(done)

    return tick


class Samples:
    """What calibrations ask of a data source (:class:`~vlm.models.program.tune.Material`), for one model.

    source: of the recipe's, the first one if not given. count: of samples, by what they are used for if not given.
    Raises RecipeError for a recipe without data, and where a kind of sample is asked for that the source has not.
    """

    def __init__(
        self, recipe: Recipe, model: Any, tokenizer: Any, source: str | None = None, count: int | None = None
    ) -> None:
        sources = recipe.data.sources
        if not sources or (source is not None and source not in sources):
            names = ", ".join(sources) or "any; data.sources is empty"
            raise RecipeError(f"calibrate: expected one of the recipe's sources, {names}; found {source or 'none'}")
        self.recipe, self.model, self.tokenizer, self.count = recipe, model, tokenizer, count
        self.source = source or next(iter(sources))
        self.store = Store(load_manifest(list(sources[self.source].shards)))
        self.encoder = build_encoder(recipe, model, tokenizer)
        self.collate = build_collate(self.encoder, tokenizer)

    @cached_property
    def asked(self) -> list[Asked]:
        """The first question of each sample up to its answer, and the token that the answer begins with."""
        found = []
        for chunk in self._chunks("asked", lambda sample: True, "samples"):
            inputs, first = self._prompts(chunk)
            found.append(Asked(inputs, inputs.tokens.gather(1, first[:, None])[:, 0]))
        return found

    @cached_property
    def described(self) -> list[Described]:
        """Pictures with what is said of them, and that with objects in it that are not there."""
        return [self._described(chunk) for chunk in self._chunks("described", is_caption, "captions of a picture each")]

    @cached_property
    def captioned(self) -> list[Described]:
        """Pictures with what is said of them."""
        found = self._chunks("captioned", is_caption, "captions of a picture each")
        return [self._described(chunk) for chunk in found]

    @cached_property
    def judged(self) -> list[Judged]:
        """What the model itself says of pictures of which the objects are known (``tags``). It is asked what the
        recipe's CHAIR benchmark asks, if it has one, else what the sample asks."""
        pictures: dict[str, bytes] = {}
        batch = self.recipe.evaluate.batch
        asker = Asker(self.model, self.tokenizer, self.encoder, pictures.__getitem__, batch)
        tick = _ticking("answers to calibrate on")
        found, done = [], 0
        words = self.vocabulary
        for chunk in self._chunks("judged", self._is_known, "pictures with the names of their objects as tags"):
            prompts = []
            for number, (_, sample) in enumerate(chunk):
                pictures[str(number)] = sample.media[0]
                text = self._chair.prompt if self._chair else _text(sample.messages[0])
                prompts.append(Prompt(str(number), text, self._chair.max_new_tokens if self._chair else 64))
            asker._seen.clear()  # the names now stand for other pictures
            answers = asker.generate(prompts)
            known = [self._objects(sample) for _, sample in chunk]
            mentions = [self._mentions(words, ids, there) for ids, there in zip(answers, known, strict=True)]
            found.append(Judged(asker.inputs(prompts), answers, mentions))
            done += len(chunk)
            tick(done, self._wanted("judged"))
        return found

    @cached_property
    def _chair(self) -> Any:
        chairs = [spec for spec in self.recipe.evaluate.benchmarks.values() if str(spec.use) == "chair"]
        return create("benchmark", chairs[0]) if chairs else None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Names of objects: those of the recipe's CHAIR benchmark, else the tags of the first thousand samples."""
        if self._chair is not None:
            return Vocabulary.read(self._chair.synonyms)
        some = range(min(len(self.store), 1000))
        tags = sorted({tag.lower().replace(",", " ") for n in some for tag in self.store.read(n).tags})
        if not tags:
            raise RecipeError(
                f"calibrate: expected samples of {self.source} with the names of their objects as tags; found none"
            )
        return Vocabulary.parse("\n".join(tags), f"tags of {self.source}")

    def _objects(self, sample: Sample) -> frozenset[str]:
        nodes = self.vocabulary.nodes
        return frozenset(nodes[tag.lower()] for tag in sample.tags if tag.lower() in nodes)

    def _is_known(self, sample: Sample) -> bool:
        return len(sample.media) == 1 and bool(sample.tags) and bool(self._objects(sample))

    def _mentions(self, words: Vocabulary, ids: Sequence[int], there: frozenset[str]) -> list[tuple[int, bool]]:
        """For each object that an answer names, the token with which the name begins and whether it is made up."""
        ends = [len(self.model.detokenize(ids[: n + 1])) for n in range(len(ids))]
        text = self.model.detokenize(ids)
        return [
            (next(n for n, end in enumerate(ends) if end > mention.start), mention.object not in there)
            for mention in words.mentions(text)
        ]

    def _described(self, chunk: Sequence[tuple[int, Sample]]) -> Described:
        texts = [_text(answer_of(sample)) for _, sample in chunk]
        wrong = [self._wrong(sample, text) for (_, sample), text in zip(chunk, texts, strict=True)]
        return Described(self._prompts(chunk)[0], texts, wrong)

    def _wrong(self, sample: Sample, text: str) -> str:
        """A made-up answer: the one that the sample rejects; else its own with other objects than those that are there;
        "" where neither is known."""
        if sample.rejected and len([m for m in sample.messages if m.role == "assistant"]) == 1:
            return _text(sample.rejected[0])
        if not sample.tags:
            return ""
        there = self._objects(sample)
        absent = sorted({node for node in self.vocabulary.nodes.values()} - there)
        mentions = [mention for mention in self.vocabulary.mentions(text) if mention.object in there]
        if not mentions or not absent:
            return ""
        draw = torch.Generator().manual_seed(len(text) + 1009 * len(sample.key))
        for mention in reversed(mentions):
            other = absent[int(torch.randint(len(absent), (), generator=draw))]
            text = text[: mention.start] + other + text[mention.end :]
        return text

    def _wanted(self, kind: str) -> int:
        return SAMPLES[kind] if self.count is None else self.count

    def _chunks(self, kind: str, fits: Callable[[Sample], bool], what: str) -> Iterator[list[tuple[int, Sample]]]:
        """Batches of the first samples that fit, with their numbers. Raises RecipeError when none does."""
        chunk: list[tuple[int, Sample]] = []
        wanted = left = self._wanted(kind)
        for number in range(min(len(self.store), READ_AT_MOST * wanted)):
            sample = self.store.read(number)
            if not fits(sample):
                continue
            chunk.append((number, sample))
            left -= 1
            if len(chunk) == self.recipe.evaluate.batch or not left:
                yield chunk
                chunk = []
            if not left:
                return
        if chunk:
            yield chunk
        elif left == wanted:
            raise RecipeError(f"calibrate: expected {what} in the source {self.source}; found none")

    def _prompts(self, chunk: Sequence[tuple[int, Sample]]) -> tuple[Any, Any]:
        """The first question of each sample up to its answer, and the places [B] at which that begins."""
        draw = partial(Draw, epoch=0, seed=self.recipe.seed)
        device = next(self.model.parameters()).device
        batch = self.collate([self.encoder(sample, draw(position=n)) for n, sample in chunk]).to(device)
        inputs, weights = inputs_of(batch), batch.weights
        place = torch.arange(weights.shape[1], device=device)
        first = torch.where(weights > 0, place, weights.shape[1]).amin(1)
        usable = bool((first < weights.shape[1]).all()) and not bool((inputs.visual & (place >= first[:, None])).any())
        if not usable:
            raise RecipeError("calibrate: expected samples of one question, with its images before the answer, each")
        return inputs._replace(valid=inputs.valid & (place < first[:, None])), first


def answer_of(sample: Sample) -> Message:
    """The first turn of the assistant."""
    return next((message for message in sample.messages if message.role == "assistant"), Message("assistant", ()))


def is_caption(sample: Sample) -> bool:
    """Whether a sample says of one picture more than a word or two."""
    return len(sample.media) == 1 and len(_text(answer_of(sample)).split()) >= CAPTION_WORDS


def _text(message: Message) -> str:
    return "".join(part.text for part in message.content if part.type == "text").strip()
